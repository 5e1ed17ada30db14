/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a process sends to a frontend goes to a backend from the start: the destination is changed where the process
 * names it, and changed back where it asks. Packets then cost nothing: they are addressed to the backend.
 *
 * fib_connect4, 6      connect(): TCP and UDP
 * fib_sendmsg4, 6      a datagram with a destination of its own
 * fib_recvmsg4, 6      whom a datagram came from
 * fib_peername4, 6     whom a socket is connected to
 * fib_release          the socket is closed
 *
 * The programs for IPv6 also see IPv4 in IPv6 sockets (::ffff:a.b.c.d). A client in the cluster gets the inside
 * stretch; ranges of sources concern clients elsewhere. Where the client's port is not known yet, Maglev has nothing to
 * hash: such a service, too, spreads sockets at random.
 *
 * Without a backend the call fails at once (ECONNREFUSED), as if a host had refused it. Where the service is to say
 * nothing, the destination stays as it is: packets of pods end in the slot LB, those of the host where its routes lead,
 * and who waits gets the first backend that comes, by packets.
 *
 * A process may be preempted here and others run on the same CPU, so all state is on the stack.
 */
#include <uapi/linux/in.h>

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "abi/lb.h"
#include "lb/choose.h"
#include "lb/front.h"
#include "lb/sock_entries.h"

#define IDENTITY_HOST 1
#define REFUSED (-111)   /* ECONNREFUSED */

/* Where a socket wants to go to; and then, where it goes to. */
struct destination {
	struct fib_addr addr;
	__be16 port;
	__u8 proto;
};

enum outcome {
	ASIDE, /* no frontend: as it is */
	MOVED,
	REFUSE,
};

static __always_inline bool is_loopback(const struct fib_addr *addr)
{
	if (fib_addr_is_v4(addr))
		return (addr->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !addr->q[0] && !addr->w[2] && addr->w[3] == bpf_htonl(1);
}

/* A node port at an address that lb_front_find does not know for the node's: its loopback, and other nodes'. A pod's
 * loopback is its own. */
static __always_inline struct lb_front *front_of_nodes(const struct destination *to, bool loopback, bool host)
{
	struct lb_front_key key = { .port = to->port, .proto = to->proto };
	struct ipcache_entry *entry;
	struct lb_front *front;
	struct fib_addr addr;
	__u32 zero = 0, hint;
	void *inner;

	if (loopback && !host)
		return 0;
	lb_front_any(&key.addr, fib_addr_is_v4(&to->addr));
	hint = lb_hint(&key.addr);
	if (!(hint & LB_HINT_VIP) || !to->port)
		return 0;
	inner = lb_fronts.lookup(&zero);
	if (!inner)
		return 0;
	front = bpf_map_lookup_elem_((uintptr_t)inner, &key);
	if (!front && hint & LB_HINT_RANGE)
		front = lb_front_range(&key.addr, to->port, to->proto);
	if (!front || loopback)
		return front;
	if (!(front->flags & LB_FRONT_EVERY))
		return 0;
	addr = to->addr;
	entry = ipcache_ask(&addr);
	return entry && (entry->identity == IDENTITY_REMOTE_NODE || entry->identity == IDENTITY_HOST) ? front : 0;
}

/* Whether a socket is of this node: programs at the root of all control groups see others' as well. */
static __always_inline bool is_ours(const struct lb_config *config, __u64 netns)
{
	if (!(config->flags & LB_CFG_NETNS) || netns == config->host_netns)
		return true;
	return ep_netns.lookup(&netns);
}

/* The backend that an unconnected socket has for a frontend, if it has one. */
static __always_inline bool known(struct lb_sock_key *key, const struct lb_front *front, struct destination *to)
{
	struct lb_sock *own, *entry;

	own = own_of(key);
	if (!own)
		return false;
	if (is_for(own, &to->addr, to->port) && stays(own, front)) {
		if (unlikely(own->flags & LB_SOCK_DIRECT))
			own->flags &= ~LB_SOCK_DIRECT;
		if (unlikely(has_further(own)))
			answers_from(key, own, false);
		entry = own;
	} else {
		if (!has_further(own))
			return false;
		key_of(key, LB_SOCK_TO, &to->addr, to->port);
		entry = lb_socks.lookup(key);
		if (!entry || !still_there(entry, front))
			return false;
		answers_from(key, entry, true);
	}
	to->addr = entry->addr;
	to->port = entry->port;
	return true;
}

/* A socket that goes to a backend by its own name gets answers from there. To where it is connected a socket speaks without
 * naming it; but of an IPv6 socket with an IPv4 peer the kernel does name it here. */
static __always_inline void go_direct(struct lb_sock_key *key, const struct destination *to, bool connects)
{
	struct lb_sock *own;

	own = own_of(key);
	if (!own)
		return;
	if (leads_to(own, &to->addr, to->port) && (connects || !(own->flags & LB_SOCK_CONNECTED)))
		own->flags |= LB_SOCK_DIRECT;
	if (has_further(own)) {
		key_of(key, LB_SOCK_FROM, &to->addr, to->port);
		lb_socks.delete(key);
	}
}

static __always_inline enum outcome translate(struct bpf_sock_addr *ctx, struct destination *to, bool connects)
{
	bool loopback = is_loopback(&to->addr), v4 = fib_addr_is_v4(&to->addr);
	struct lb_config *config = lb_configuration();
	struct lb_sock_key key = { .proto = to->proto };
	__u32 hint = lb_hint(&to->addr);
	struct lb_front *front = 0;
	struct lb_backend *backend;
	struct lb_service *service;
	struct lb_sock entry;
	struct fib_addr client;
	__u64 netns, hash = 0;

	if (unlikely(!config))
		return ASIDE;
	netns = bpf_get_netns_cookie(ctx);
	if (likely(!loopback))
		front = lb_front_hinted(hint, &to->addr, to->port, to->proto);
	if (unlikely(!front))
		front = front_of_nodes(to, loopback, netns == config->host_netns);
	if (unlikely(!front)) {
		if (unlikely(hint & LB_HINT_BACKEND) && is_ours(config, netns)) {
			key.cookie = bpf_get_socket_cookie(ctx);
			go_direct(&key, to, connects);
		}
		return ASIDE;
	}
	service = lb_service(front->service);
	if (unlikely(!service || !is_ours(config, netns)))
		return ASIDE;
	key.cookie = bpf_get_socket_cookie(ctx);
	if (!connects && known(&key, front, to))
		return MOVED;
	client.q[0] = netns;
	client.q[1] = 0;
	if (unlikely(service->flags & LB_SVC_MAGLEV))
		hash = (__u64)bpf_get_prandom_u32() << 32;
	backend = choose_backend(config, service, front->service, false, &client, hash);
	/* A socket of one family does not reach the other. */
	if (unlikely(!backend || fib_addr_is_v4(&backend->addr) != v4))
		return service->flags & LB_SVC_DROP ? ASIDE : REFUSE;
	entry.vip = to->addr;
	entry.vport = to->port;
	entry.addr = backend->addr;
	entry.port = lb_front_port(front, backend, to->port);
	entry.netns = netns;
	entry.backend = backend->id;
	entry.flags = connects ? LB_SOCK_CONNECTED : 0;
	entry.proto = to->proto;
	to->addr = entry.addr;
	to->port = entry.port;
	note(&key, &entry);
	lb_count(LB_STAT_SOCK);
	return MOVED;
}

/* The frontend's name for what comes from a backend; whether there is one. */
static __always_inline bool translate_back(struct bpf_sock_addr *ctx, struct destination *from, bool peer)
{
	struct lb_sock_key key = { .proto = from->proto };
	struct lb_sock *own, *entry;

	/* Who is connected may be so to a backend that has left. */
	if (!peer && likely(!(lb_hint(&from->addr) & LB_HINT_BACKEND)))
		return false;
	key.cookie = bpf_get_socket_cookie(ctx);
	own = own_of(&key);
	if (!own)
		return false;
	if (unlikely(has_further(own)) && !peer) {
		key_of(&key, LB_SOCK_FROM, &from->addr, from->port);
		entry = lb_socks.lookup(&key);
		if (entry) {
			from->addr = entry->vip;
			from->port = entry->vport;
			return true;
		}
	}
	if (!leads_to(own, &from->addr, from->port) || own->flags & LB_SOCK_DIRECT)
		return false;
	if (peer && !(own->flags & LB_SOCK_CONNECTED))
		return false;
	from->addr = own->vip;
	from->port = own->vport;
	return true;
}

static __always_inline void read_v4(const struct bpf_sock_addr *ctx, struct destination *to)
{
	fib_addr_set_v4(&to->addr, ctx->user_ip4);
	to->port = ctx->user_port;
	to->proto = ctx->protocol;
}

static __always_inline void write_v4(struct bpf_sock_addr *ctx, const struct destination *to)
{
	ctx->user_ip4 = to->addr.w[3];
	ctx->user_port = to->port;
}

static __always_inline void read_v6(const struct bpf_sock_addr *ctx, struct destination *to)
{
	to->addr.w[0] = ctx->user_ip6[0];
	to->addr.w[1] = ctx->user_ip6[1];
	to->addr.w[2] = ctx->user_ip6[2];
	to->addr.w[3] = ctx->user_ip6[3];
	to->port = ctx->user_port;
	to->proto = ctx->protocol;
}

static __always_inline void write_v6(struct bpf_sock_addr *ctx, const struct destination *to)
{
	ctx->user_ip6[0] = to->addr.w[0];
	ctx->user_ip6[1] = to->addr.w[1];
	ctx->user_ip6[2] = to->addr.w[2];
	ctx->user_ip6[3] = to->addr.w[3];
	ctx->user_port = to->port;
}

/* What a program returns: whether the call goes on. Before Linux 5.18 it fails with EPERM else. */
static __always_inline int goes_on(enum outcome outcome)
{
	if (likely(outcome != REFUSE))
		return 1;
#if SOCK_RETVAL
	bpf_set_retval(REFUSED);
#endif
	return 0;
}

static __always_inline int outward_v4(struct bpf_sock_addr *ctx, bool connects)
{
	struct destination to;
	enum outcome outcome;

	read_v4(ctx, &to);
	outcome = translate(ctx, &to, connects);
	if (outcome == MOVED)
		write_v4(ctx, &to);
	return goes_on(outcome);
}

static __always_inline int outward_v6(struct bpf_sock_addr *ctx, bool connects)
{
	struct destination to;
	enum outcome outcome;

	read_v6(ctx, &to);
	outcome = translate(ctx, &to, connects);
	if (outcome == MOVED)
		write_v6(ctx, &to);
	return goes_on(outcome);
}

static __always_inline int inward_v4(struct bpf_sock_addr *ctx, bool peer)
{
	struct destination from;

	read_v4(ctx, &from);
	if (translate_back(ctx, &from, peer))
		write_v4(ctx, &from);
	return 1;
}

static __always_inline int inward_v6(struct bpf_sock_addr *ctx, bool peer)
{
	struct destination from;

	read_v6(ctx, &from);
	if (translate_back(ctx, &from, peer))
		write_v6(ctx, &from);
	return 1;
}

int fib_connect4(struct bpf_sock_addr *ctx)
{
	return outward_v4(ctx, true);
}

int fib_connect6(struct bpf_sock_addr *ctx)
{
	return outward_v6(ctx, true);
}

int fib_sendmsg4(struct bpf_sock_addr *ctx)
{
	return outward_v4(ctx, false);
}

int fib_sendmsg6(struct bpf_sock_addr *ctx)
{
	return outward_v6(ctx, false);
}

int fib_recvmsg4(struct bpf_sock_addr *ctx)
{
	return inward_v4(ctx, false);
}

int fib_recvmsg6(struct bpf_sock_addr *ctx)
{
	return inward_v6(ctx, false);
}

int fib_peername4(struct bpf_sock_addr *ctx)
{
	return inward_v4(ctx, true);
}

int fib_peername6(struct bpf_sock_addr *ctx)
{
	return inward_v6(ctx, true);
}

int fib_release(struct bpf_sock *ctx)
{
	struct lb_sock_key key = { .proto = ctx->protocol, .cookie = bpf_get_socket_cookie(ctx) };
	struct lb_sock_near *near = near_of(key.cookie);
	struct fib_addr next = {}, backend;
	__be16 nport, port;
	struct lb_sock *entry;

	entry = own_of(&key);
	if (likely(!entry) || !near)
		return 1;
	nport = 0;
	if (unlikely(has_further(entry))) {
		next = entry->next;
		nport = entry->nport;
	}
	if (near->cookie == key.cookie) {
		*(volatile __u64 *)&near->cookie = 0;
		__sync_fetch_and_add(&near->claims, -1);
	}
	/* Threads that sent their first datagrams at once may have made two. */
	if (unlikely(*(volatile __u32 *)&near->crowd)) {
		key_own(&key);
		if (!lb_socks.delete(&key))
			__sync_fetch_and_add(&near->crowd, -1);
	}
	for (int i = 0; i < FURTHER_MAX && nport; i++) {
		key_of(&key, LB_SOCK_TO, &next, nport);
		entry = lb_socks.lookup(&key);
		if (!entry)
			break;
		backend = entry->addr;
		port = entry->port;
		next = entry->next;
		nport = entry->nport;
		lb_socks.delete(&key);
		key_of(&key, LB_SOCK_FROM, &backend, port);
		lb_socks.delete(&key);
	}
	return 1;
}
