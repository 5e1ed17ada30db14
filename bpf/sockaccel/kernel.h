/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Reading the kernel's own sockets. Where fields lie is given by AT_* macros, which user space takes from the kernel's type information
 * (services/sockaccel/install.py).
 *
 * A socket's address is remembered while it is in sa_socks. Memory of sockets is used again for sockets, and reading never faults:
 * so what was read counts if the socket has the cookie it had.
 */
#pragma once

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

/* How many bytes do. Kernels before 6.14 do not count them: then all that was handed over since this was last asked counts, unless the queue is empty. */
static __always_inline __u32 sa_waiting(const struct sa_end *end)
{
	__u32 counted;

	if (!sa_queue(end->sock))
		return 0;
	counted = sa_read32(end->sock, AT_SK_RMEM);
	return counted ? counted : end->unread;
}
