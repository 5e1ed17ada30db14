/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* TLS that the kernel does (kTLS): what a process writes passes the program of the map its socket is in before it is encrypted.
 *
 * fib_tls_ops  sock_ops: sockets of chosen pods and ports are put in tls_socks when they are connected: once TLS is on, the kernel refuses
 * fib_tls_msg  sk_msg: each record of such a socket, in plain text
 *
 * Nothing is held back, changed or sent elsewhere. tls_socks is held by the service's process alone, and so are these programs: should it die,
 * sockets are what they were.
 */
#include "sockaccel/tls.h"

BPF_SOCKHASH(tls_socks, __u64, TLS_SOCKS_MAX);

/* BCC's declarations cut these to 32 bits. */
static __u64 (*tls_cookie_of)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

static __always_inline bool tls_is_chosen(__u64 netns, __u32 port)
{
	struct tls_port key = { .netns = netns, .port = port };

	return tls_ports.lookup(&key);
}

/* The reply of a sock_ops program is an option of the connection: it is never touched here. */
int fib_tls_ops(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op, port;
	__u64 cookie;
	int failed;

	if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		port = bpf_ntohl(ctx->remote_port);
	else if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		port = ctx->local_port;
	else
		return 1;
	if (!tls_is_chosen(bpf_get_netns_cookie(ctx), port))
		return 1;
	cookie = tls_cookie_of(ctx);
	failed = tls_socks.sock_hash_update(ctx, &cookie, BPF_NOEXIST);
	tls_count(failed ? TLS_STAT_TAKEN : TLS_STAT_HELD);
	return 1;
}

/* Whether TLS is on top of a socket. */
static __always_inline bool tls_is_on(__u64 sock)
{
	__u64 layer = tls_kernel64(sock, AT_ULP_OPS);
	__u32 name = 0;

	if (!layer)
		return false;
	bpf_probe_read_kernel(&name, sizeof(name), (void *)(layer + AT_ULP_NAME));
	return name == TLS_WORD('t', 'l', 's', 0);
}

int fib_tls_msg(struct sk_msg_md *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx), sock;
	struct bpf_sock *sk = ctx->sk;
	struct tls_record *record;
	__u32 size = ctx->size, word = 0, captured;
	void *data;

	if (size < TLS_SHORTEST || !sk)
		return SK_PASS;
	sock = (__u64)bpf_skc_to_tcp_sock(sk);
	if (!sock || !tls_is_on(sock))
		return SK_PASS;
	/* The target may have gone, or its ports have changed, since. */
	if (!tls_is_chosen(netns, bpf_ntohl(ctx->remote_port)) && !tls_is_chosen(netns, ctx->local_port))
		return SK_PASS;
	captured = size < TLS_HEAD ? size : TLS_HEAD;
	/* What lies in the process's own pages, or in several of the kernel's, is copied into one. */
	if (bpf_msg_pull_data(ctx, 0, captured, 0))
		return SK_PASS;
	data = ctx->data;
	if (data + TLS_SHORTEST > ctx->data_end)
		return SK_PASS;
	word = *(__u32 *)data;
	if (!tls_begins(word))
		return SK_PASS;
	record = tls_record(sock, (__u32)tls_kernel64(tls_kernel64(sock, AT_SK_NET), AT_NET_INUM), 0, 1);
	if (!record)
		return SK_PASS;
	if (bpf_probe_read_kernel(record->head, captured, data))
		captured = 0;
	record->captured = captured;
	tls_records.ringbuf_submit(record, 0);
	return SK_PASS;
}
