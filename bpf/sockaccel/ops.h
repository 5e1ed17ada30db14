/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Where connections begin and end. */
#pragma once

/* Reports of round trips and of states, for sockets that are considered: the first comes with the first acknowledgement. */
#define SA_WATCHED (BPF_SOCK_OPS_RTT_CB_FLAG | BPF_SOCK_OPS_STATE_CB_FLAG)
#define SA_GROUP_LEVELS 8
#define SA_AF_INET 2
#define SA_E2BIG 7
#define SA_ENOMEM 12

static __always_inline bool sa_is_loopback(const struct fib_addr *addr)
{
	if (fib_addr_is_v4(addr))
		return (addr->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !addr->q[0] && !addr->w[2] && addr->w[3] == bpf_htonl(1);
}

static __always_inline void sa_local(struct bpf_sock_ops *ctx, struct fib_addr *addr)
{
	if (ctx->family == SA_AF_INET) {
		fib_addr_set_v4(addr, ctx->local_ip4);
		return;
	}
	addr->w[0] = ctx->local_ip6[0];
	addr->w[1] = ctx->local_ip6[1];
	addr->w[2] = ctx->local_ip6[2];
	addr->w[3] = ctx->local_ip6[3];
}

static __always_inline void sa_remote(struct bpf_sock_ops *ctx, struct fib_addr *addr)
{
	if (ctx->family == SA_AF_INET) {
		fib_addr_set_v4(addr, ctx->remote_ip4);
		return;
	}
	addr->w[0] = ctx->remote_ip6[0];
	addr->w[1] = ctx->remote_ip6[1];
	addr->w[2] = ctx->remote_ip6[2];
	addr->w[3] = ctx->remote_ip6[3];
}

static __always_inline __u32 sa_remote_port(struct bpf_sock_ops *ctx)
{
	return bpf_ntohl(ctx->remote_port);
}

/* Ports narrow down which classes it can be. */
static __always_inline __u32 sa_classes_of_port(const struct sa_config *config, __u32 port)
{
	struct sa_port *known = sa_ports.lookup(&port);

	return config->any_port | (known ? known->classes : 0);
}

static __always_inline bool sa_is_proxy_port(__u32 port)
{
	struct sa_port *known = sa_ports.lookup(&port);

	return known && known->proxy;
}

static __always_inline bool sa_is_proxy_uid(__u32 uid)
{
	return sa_uids.lookup(&uid);
}

/* Of the socket's owner. */
static __always_inline __u32 sa_uid_of(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	void *tcp = sk ? bpf_skc_to_tcp_sock(sk) : 0;

	return tcp ? sa_read32((__u64)tcp, AT_SK_UID) : ~0U;
}

/* Classes whose control groups hold the socket's. */
static __always_inline __u32 sa_classes_of_group(__u64 sock)
{
	__u64 group = sa_read64(sock, AT_SK_CGROUP);
	__u32 found = 0;

#pragma unroll
	for (int level = 0; level < SA_GROUP_LEVELS; level++) {
		__u64 id;
		__u32 *classes;

		if (!group)
			break;
		id = sa_read64(sa_read64(group, AT_CGROUP_KN), AT_KN_ID);
		classes = sa_groups.lookup(&id);
		if (classes)
			found |= *classes;
		/* A group begins with its own css. */
		group = sa_read64(group, AT_CSS_PARENT);
	}
	return found;
}

/* Classes a client may be of, by where it wants to. */
static __always_inline __u32 sa_wanted(const struct sa_config *config, const struct sa_space *space,
				       struct fib_addr *from, struct fib_addr *to, __u32 port, struct bpf_sock_ops *ctx)
{
	__u32 classes = space->client & config->classes;

	if (!classes)
		return 0;
	/* Where a proxy is at work, what a client wants is not where it gets. */
	if (space->flags & SA_SPACE_PROXIED && classes & config->same)
		return classes;
	if (sa_is_loopback(to) || fib_addr_same(from, to)) {
		classes &= space->endpoint ? config->same : config->within;
		if (classes & config->proxies && !sa_is_proxy_port(port) && !sa_is_proxy_uid(sa_uid_of(ctx)))
			classes &= ~config->proxies;
		return classes ? classes & sa_classes_of_port(config, port) : 0;
	}
	if (space->endpoint && sa_hosts.lookup(to))
		classes &= config->host;
	else if (endpoint_by_address(to, fib_addr_is_v4(to) ? 4 : 6))
		classes &= space->endpoint ? config->pods : config->host;
	else
		return 0;
	return classes ? classes & sa_classes_of_port(config, port) : 0;
}

/* A client is connected: its server will look for it. */
static __always_inline void sa_connected(struct bpf_sock_ops *ctx, const struct sa_config *config, struct sa_space *space, __u64 netns)
{
	struct sa_opening_key key = {};
	struct sa_pair opening = {};
	struct sa_end *me = &opening.ends[0];
	struct bpf_sock *sk;
	void *tcp;
	struct sa_mine mine = {};
	struct sa_mine *kept;
	int failed;

	sa_local(ctx, &me->addr);
	sa_remote(ctx, &opening.ends[1].addr);
	opening.ends[1].port = sa_remote_port(ctx);
	opening.class = sa_wanted(config, space, &me->addr, &opening.ends[1].addr, opening.ends[1].port, ctx);
	if (!opening.class)
		return;
	sk = ctx->sk;
	tcp = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	if (!tcp || bpf_skc_to_mptcp_sock(sk))
		return;
	me->sock = (__u64)tcp;
	me->cookie = sa_cookie_of(ctx);
	me->netns = netns;
	me->port = ctx->local_port;
	me->endpoint = space->endpoint;
	me->uid = sa_read32(me->sock, AT_SK_UID);
	key.addr = me->addr;
	key.netns = sa_is_loopback(&me->addr) ? netns : 0;
	key.client_seq = ctx->snd_nxt;
	key.server_seq = ctx->rcv_nxt;
	key.port = me->port;
	mine.pair = me->cookie;
	kept = sa_mine.sk_storage_get(sk, &mine, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept) {
		sa_count(SA_STAT_FULL, 1);
		return;
	}
	*kept = mine; /* it may have been connected before */
	failed = sa_socks.sock_hash_update(ctx, &mine.pair, BPF_NOEXIST);
	if (failed) {
		sa_count(failed == -SA_E2BIG || failed == -SA_ENOMEM ? SA_STAT_FULL : SA_STAT_TAKEN, 1);
		return;
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | SA_WATCHED);
	sa_opening.update(&key, &opening);
}

/* Whether a server has an address that nobody has here: the connection was meant for another, and given to it (TPROXY). */
static __always_inline bool sa_is_transparent(struct sa_end *server)
{
	struct endpoint *pod;

	if (sa_is_loopback(&server->addr))
		return false;
	if (!server->endpoint)
		return !sa_hosts.lookup(&server->addr);
	pod = endpoint_by_address(&server->addr, fib_addr_is_v4(&server->addr) ? 4 : 6);
	return !pod || pod->id != server->endpoint;
}

/* The class of a pair, or SA_CLASSES. */
static __always_inline __u32 sa_class_of(const struct sa_config *config, const struct sa_pair *opening, const struct sa_space *space,
					 const struct sa_end *server, bool redirected)
{
	const struct sa_end *client = &opening->ends[0];
	__u32 classes = opening->class & space->server & config->classes;
	bool host = !client->endpoint || !server->endpoint;

	if (client->netns == server->netns)
		classes &= server->endpoint ? config->same : config->within;
	else
		classes &= host ? config->host : config->pods;
	if (!classes)
		return SA_CLASSES;
	classes &= sa_classes_of_port(config, server->port) | sa_classes_of_port(config, opening->ends[1].port);
	if (classes & config->proxies && !redirected && !sa_is_proxy_port(server->port) && !sa_is_proxy_uid(client->uid) &&
	    !sa_is_proxy_uid(server->uid))
		classes &= ~config->proxies;
	if (classes && config->flags & SA_CFG_GROUPS)
		classes &= config->any_group | sa_classes_of_group(client->sock) | sa_classes_of_group(server->sock);
	if (!classes)
		return SA_CLASSES;
	/* The first of them. */
	classes &= -classes;
	return (classes & 0xaaaaaaaa ? 1 : 0) | (classes & 0xcccccccc ? 2 : 0) | (classes & 0xf0f0f0f0 ? 4 : 0) |
	       (classes & 0xff00ff00 ? 8 : 0) | (classes & 0xffff0000 ? 16 : 0);
}

/* A server is connected: is its client here? */
static __always_inline void sa_accepted(struct bpf_sock_ops *ctx, const struct sa_config *config, struct sa_space *space, __u64 netns)
{
	struct sa_opening_key key = {};
	struct sa_end me = {};
	struct sa_mine mine = { .side = 1 };
	struct sa_pair *opening, *pair;
	bool redirected;
	__u64 listener;
	struct bpf_sock *sk;
	void *tcp;
	__u32 class;
	int failed;

	sk = ctx->sk;
	tcp = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	if (!tcp)
		return;
	me.sock = (__u64)tcp;
	me.netns = netns;
	me.port = ctx->local_port;
	me.endpoint = space->endpoint;
	me.uid = sa_read32(me.sock, AT_SK_UID);
	if (!(space->flags & SA_SPACE_PROXIED) && space->server & config->proxies && (sa_is_proxy_port(me.port) || sa_is_proxy_uid(me.uid)))
		space->flags |= SA_SPACE_PROXIED;
	sa_remote(ctx, &key.addr);
	key.netns = sa_is_loopback(&key.addr) ? netns : 0;
	key.client_seq = ctx->rcv_nxt;
	key.server_seq = ctx->snd_nxt;
	key.port = sa_remote_port(ctx);
	opening = sa_opening.lookup(&key);
	if (!opening)
		return;
	sa_local(ctx, &me.addr);
	redirected = me.port != opening->ends[1].port || !fib_addr_same(&me.addr, &opening->ends[1].addr) ||
		     (opening->ends[0].netns == netns && sa_is_transparent(&me));
	class = sa_class_of(config, opening, space, &me, redirected);
	listener = sa_listener(netns, me.port);
	if (class < SA_CLASSES && sa_must_not_wait(class, config) && sa_blocking.lookup(&listener))
		class = SA_CLASSES;
	if (class < SA_CLASSES) {
		mine.pair = opening->ends[0].cookie;
		me.cookie = sa_cookie_of(ctx);
		failed = sa_mine.sk_storage_get(sk, &mine, BPF_SK_STORAGE_GET_F_CREATE) ? 0 : -SA_ENOMEM;
		if (!failed)
			failed = sa_socks.sock_hash_update(ctx, &me.cookie, BPF_NOEXIST);
		if (!failed) {
			failed = sa_pairs.update(&mine.pair, opening);
			pair = failed ? 0 : sa_pairs.lookup(&mine.pair);
			if (pair) {
				pair->made = bpf_ktime_get_ns();
				pair->class = class;
				pair->epoch = config->epoch - 1; /* judged with the first send */
				pair->flags = redirected ? SA_PAIR_REDIRECTED : 0;
				pair->speaker = 1; /* so that the first word of the client is a turn */
				pair->ends[1] = me;
				sa_count(SA_STAT_PAIRS, 1);
			} else {
				sa_socks.delete(&me.cookie);
			}
		}
		if (failed)
			sa_count(failed == -SA_E2BIG || failed == -SA_ENOMEM ? SA_STAT_FULL : SA_STAT_TAKEN, 1);
		else
			bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | SA_WATCHED);
	}
	sa_opening.delete(&key);
}

/* Acknowledgements tell when a socket is in sa_socks for nothing: its other end is not here, or the pair has ended. What was handed over has to
 * be read first. */
static __always_inline void sa_settle(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sa_mine *mine = sk ? sa_mine.sk_storage_get(sk, 0, 0) : 0;
	struct sa_pair *pair;
	__u64 cookie, other;
	void *tcp;

	if (!mine)
		return;
	pair = sa_pairs.lookup(&mine->pair);
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp)
		return;
	/* Its other end is closed and gone, but what that handed over may still wait here: only a socket that connects anew is rid of it. */
	if (!pair && sa_queue((__u64)tcp) && ctx->state != SA_TCP_SYN_SENT)
		return;
	if (pair && (!pair->ended || pair->ends[0].stuck || pair->ends[1].stuck || !sa_is_empty(pair, 0) || !sa_is_empty(pair, 1)))
		return;
	cookie = sa_cookie_of(ctx);
	if (pair) {
		other = pair->ends[!mine->side].cookie;
		sa_count(SA_STAT_ENDED + (pair->ended & 7), 1);
		sa_tell(SA_EVENT_ENDED, pair);
		sa_pairs.delete(&mine->pair);
		sa_socks.delete(&other);
	} else if (!mine->side && !mine->reader) {
		sa_count(SA_STAT_ALONE, 1);
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~SA_WATCHED);
	sa_socks.delete(&cookie);
	sa_mine.sk_storage_delete(sk);
}

static __always_inline void sa_closed(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sa_mine *mine = sk ? sa_mine.sk_storage_get(sk, 0, 0) : 0;
	struct sa_pair *pair = mine ? sa_pairs.lookup(&mine->pair) : 0;
	__u64 other;

	if (!pair)
		return;
	sa_finish(pair, SA_CLOSED);
	/* What the other end has not read yet is known of until it has closed too: who takes the tables down waits for it (teardown.py). Of two that
	 * close at once, one sees that the other has. */
	pair->ends[mine->side & 1].sock = 0;
	__sync_fetch_and_add(&pair->proofs, 1); /* for the barrier that it is */
	other = pair->ends[!(mine->side & 1)].sock;
	/* Another instance's program may have seen to it that nobody will be told when that closes. */
	if (sa_queue(other) && sa_read32(other, AT_TCP_CB_FLAGS) & BPF_SOCK_OPS_STATE_CB_FLAG)
		return;
	sa_count(SA_STAT_ENDED + (pair->ended & 7), 1);
	sa_tell(SA_EVENT_ENDED, pair);
	sa_pairs.delete(&mine->pair);
}

/* The reply of a sock_ops program is an option of the connection: it is never touched here. */
int fib_sa_ops(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op, zero = 0;
	struct sa_config *config;
	struct sa_space *space;
	__u64 netns, listener;

	if (op == BPF_SOCK_OPS_RTT_CB) {
		sa_settle(ctx);
		return 1;
	}
	if (op == BPF_SOCK_OPS_STATE_CB) {
		if (ctx->args[1] == SA_TCP_CLOSE)
			sa_closed(ctx);
		return 1;
	}
	if (op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_TCP_LISTEN_CB)
		return 1;
	config = sa_config.lookup(&zero);
	if (!config || !(config->flags & SA_CFG_ON))
		return 1;
	netns = bpf_get_netns_cookie(ctx);
	space = sa_spaces.lookup(&netns);
	if (!space)
		return 1;
	if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB) {
		sa_connected(ctx, config, space, netns);
	} else if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		sa_accepted(ctx, config, space, netns);
	} else {
		listener = sa_listener(netns, ctx->local_port);
		sa_blocking.delete(&listener);
		if (space->server & config->proxies && (sa_is_proxy_port(ctx->local_port) || sa_is_proxy_uid(sa_uid_of(ctx))))
			space->flags |= SA_SPACE_PROXIED;
	}
	return 1;
}
