/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Reading the kernel's own sockets. Where fields lie is given by AT_* macros, which user space takes from the kernel's type information
 * (services/sockaccel/install.py).
 *
 * A socket's address is remembered while it is in sa_socks. Memory of sockets is used again for sockets, and reading never faults:
 * so what was read counts if the socket has the cookie it had.
 */
#pragma once

#define SA_TOO_MUCH (1U << 31)
#define SA_STACK_MAX 65536
#define SA_WAITERS 8 /* looked at; with more, TCP goes on */

/* BCC's declaration cuts it to 32 bits. */
static __u64 (*sa_cookie_of)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

static __always_inline __u64 sa_read64(__u64 object, __u32 at)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(object + at));
	return value;
}

static __always_inline __u32 sa_read32(__u64 object, __u32 at)
{
	__u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(object + at));
	return value;
}

/* Whether all that `from` has sent over TCP has been read by the process at `to`, to the last byte. The caller holds the lock of `from`, so
 * that this stays true until it sends more. */
static __always_inline bool sa_all_read(const struct sa_end *from, const struct sa_end *to)
{
	__u32 written = sa_read32(from->sock, AT_TCP_WRITE_SEQ);
	__u32 copied = sa_read32(to->sock, AT_TCP_COPIED_SEQ);

	return written == copied && sa_read64(to->sock, AT_SK_COOKIE) == to->cookie;
}

/* Whether a protocol (TLS) is on top of it, without a call. What it writes would be handed over as the process gave it, not as the other end
 * wants it. */
static __always_inline bool sa_is_layered(void *tcp)
{
	return *(volatile __u64 *)(tcp + AT_ULP_OPS);
}

/* Whether TCP is short of memory (sysctl tcp_mem): what cannot be had to hand something over is an error of send(), where TCP would wait. */
static __always_inline bool sa_is_short(void *tcp)
{
	__u64 proto = *(volatile __u64 *)(tcp + AT_SK_PROTO);

	return sa_read64(*(volatile __u64 *)(proto + AT_PROTO_PRESSURE), 0);
}

/* Whether a socket has something about it that the short way does not know. */
static __always_inline bool sa_is_special(const struct sa_end *end)
{
	return sa_read32(end->sock, AT_SK_RCVLOWAT) > 1 || sa_read64(end->sock, AT_ULP_OPS);
}

/* Whether anything handed to a socket waits there to be read. */
static __always_inline bool sa_queue(__u64 sock)
{
	__u64 psock = sa_read64(sock, AT_SK_USER_DATA) & ~7ULL;

	return psock && sa_read64(psock, AT_PSOCK_INGRESS) != psock + AT_PSOCK_INGRESS;
}

/* How much does, counted as in sa_end.unread. Kernels before 6.14 do not count bytes: then all that was handed over since this was last asked
 * counts, unless the queue is empty. */
static __always_inline __u32 sa_waiting(const struct sa_end *end)
{
	__u64 psock = sa_read64(end->sock, AT_SK_USER_DATA) & ~7ULL, head = psock + AT_PSOCK_INGRESS, at;
	__u32 counted, messages = 0;

	if (!psock)
		return 0;
	/* Whoever reads takes them off meanwhile, so one may lead astray; then it is many. */
	for (at = sa_read64(head, 0); at != head && messages < SA_MESSAGES_MAX; messages++)
		at = sa_read64(at, 0);
	if (!messages)
		return 0;
	if (at != head)
		return SA_TOO_MUCH;
	counted = sa_read32(end->sock, AT_SK_RMEM);
	return counted ? counted + messages * SA_MESSAGE : end->unread;
}

enum sa_waiters {
	SA_NOBODY,
	SA_KNOWN,    /* who has read last, and nobody else */
	SA_STRANGER, /* somebody else does, or may be about to */
	SA_SEVERAL,
};

/* Which tasks wait in recv(). Of two that are woken by one word that came by TCP one takes it, and the other is too late: it waits on for TCP, and
 * would not see what is handed over. Who has read last is not that one; and whoever polls looks at both. */
static __always_inline enum sa_waiters sa_waiters(const struct sa_end *end)
{
	__u64 queue = sa_read64(end->sock, AT_SK_WQ), head = queue + AT_WQ_HEAD, at = sa_read64(head, 0), entry, task;
	__u32 strangers = sa_read32(end->sock, AT_SK_OWNED) ? 1 : 0, tasks = 0;

	if (!queue) /* not accepted yet */
		return SA_NOBODY;
#pragma unroll
	for (int number = 0; number < SA_WAITERS; number++) {
		if (at == head)
			return tasks > 1 ? SA_SEVERAL : strangers ? SA_STRANGER : tasks ? SA_KNOWN : SA_NOBODY;
		entry = at - AT_WAIT_ENTRY;
		task = sa_read64(entry, AT_WAIT_PRIVATE);
		/* A task that waits itself does so on its own stack. */
		if (task && entry - sa_read64(task, AT_TASK_STACK) < SA_STACK_MAX) {
			tasks++;
			strangers += sa_read32(task, AT_TASK_PID) != (end->reader & ~SA_WAITS);
		}
		at = sa_read64(at, 0);
	}
	return SA_STRANGER;
}
