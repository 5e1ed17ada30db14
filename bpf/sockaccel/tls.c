/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Uprobes in TLS libraries: what a process writes before it is encrypted, what it has read after it was decrypted. Only the beginnings of
 * HTTP/1 messages of chosen pods are copied, nothing else of what passes is ever looked at twice.
 *
 * fib_tls_write    SSL_write, SSL_write_ex, gnutls_record_send: (session, buffer, size, …)
 * fib_tls_go_write crypto/tls.(*Conn).Write, which has its arguments in registers of its own
 * fib_tls_read     SSL_read, gnutls_record_recv: (session, buffer, size); what was read is returned
 * fib_tls_read_ex  SSL_read_ex: (session, buffer, size, *read)
 * fib_tls_done     where those return
 *
 * AT_* macros say where arguments are (services/sockaccel/tls/programs.py).
 */
#include "sockaccel/tls.h"

#define TLS_ARGUMENT(ctx, name) ((ctx)[AT_##name / 8])

/* Inode number of the current network namespace if it is a chosen pod's, else 0. */
static __always_inline __u32 tls_space(void)
{
	__u64 space = tls_kernel64(tls_kernel64(bpf_get_current_task(), AT_TASK_NSPROXY), AT_NSPROXY_NET);
	__u32 inode = tls_kernel64(space, AT_NET_INUM);

	return inode && tls_spaces.lookup(&inode) ? inode : 0;
}

static __always_inline void tls_look(__u64 session, __u64 buffer, __u64 size, __u32 space, __u8 received)
{
	struct tls_record *record;
	__u32 word = 0, captured;

	if (size < TLS_SHORTEST || bpf_probe_read_user(&word, sizeof(word), (void *)buffer) || !tls_begins(word))
		return;
	record = tls_record(session, space, received, 0);
	if (!record)
		return;
	captured = size < TLS_HEAD ? size : TLS_HEAD;
	/* What of the buffer cannot be read is not there. */
	if (bpf_probe_read_user(record->head, captured, (void *)buffer))
		captured = 0;
	record->captured = captured;
	tls_records.ringbuf_submit(record, 0);
}

int fib_tls_write(__u64 *ctx)
{
	__u32 space = tls_space();

	if (space)
		tls_look(TLS_ARGUMENT(ctx, FIRST), TLS_ARGUMENT(ctx, SECOND), TLS_ARGUMENT(ctx, THIRD), space, 0);
	return 0;
}

int fib_tls_go_write(__u64 *ctx)
{
	__u32 space = tls_space();

	if (space)
		tls_look(TLS_ARGUMENT(ctx, GO_FIRST), TLS_ARGUMENT(ctx, GO_SECOND), TLS_ARGUMENT(ctx, GO_THIRD), space, 0);
	return 0;
}

static __always_inline int tls_enter(__u64 *ctx, __u64 size_at)
{
	struct tls_call call = { .size_at = size_at };
	__u64 thread = bpf_get_current_pid_tgid();

	if (!tls_space())
		return 0;
	call.session = TLS_ARGUMENT(ctx, FIRST);
	call.buffer = TLS_ARGUMENT(ctx, SECOND);
	tls_calls.update(&thread, &call);
	return 0;
}

int fib_tls_read(__u64 *ctx)
{
	return tls_enter(ctx, 0);
}

int fib_tls_read_ex(__u64 *ctx)
{
	return tls_enter(ctx, TLS_ARGUMENT(ctx, FOURTH));
}

int fib_tls_done(__u64 *ctx)
{
	__u64 thread = bpf_get_current_pid_tgid(), size = (__u32)TLS_ARGUMENT(ctx, RESULT);
	struct tls_call *call = tls_calls.lookup(&thread);
	struct tls_call mine;
	__u32 space;

	if (!call)
		return 0;
	mine = *call;
	tls_calls.delete(&thread);
	space = tls_space();
	if (!space || (__s32)size <= 0)
		return 0;
	if (mine.size_at && bpf_probe_read_user(&size, sizeof(size), (void *)mine.size_at))
		return 0;
	tls_look(mine.session, mine.buffer, size, space, 1);
	return 0;
}
