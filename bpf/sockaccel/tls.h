/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What programs that look into TLS have in common. AT_* macros say where fields lie (services/sockaccel/tls/programs.py). */
#pragma once

#include "abi/tls.h"

#define TLS_SHORTEST 16 /* "GET / HTTP/1.1\r\n" */

static __always_inline __u64 tls_kernel64(__u64 object, __u32 at)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(object + at));
	return value;
}

static __always_inline void tls_count(__u32 which)
{
	__u64 *count = tls_stats.lookup(&which);

	if (count)
		*count += 1;
}

#define TLS_WORD(a, b, c, d) ((__u32)(a) | (__u32)(b) << 8 | (__u32)(c) << 16 | (__u32)(d) << 24)

/* Whether four bytes begin a request or an answer of HTTP/1, or a connection of HTTP/2. */
static __always_inline bool tls_begins(__u32 word)
{
	switch (word) {
	case TLS_WORD('G', 'E', 'T', ' '):
	case TLS_WORD('P', 'O', 'S', 'T'):
	case TLS_WORD('P', 'U', 'T', ' '):
	case TLS_WORD('H', 'E', 'A', 'D'):
	case TLS_WORD('D', 'E', 'L', 'E'):
	case TLS_WORD('P', 'A', 'T', 'C'):
	case TLS_WORD('O', 'P', 'T', 'I'):
	case TLS_WORD('C', 'O', 'N', 'N'):
	case TLS_WORD('T', 'R', 'A', 'C'):
	case TLS_WORD('H', 'T', 'T', 'P'):
	case TLS_WORD('P', 'R', 'I', ' '):
		return true;
	}
	return false;
}

/* A record of the calling thread, all but the bytes; counted. 0: the buffer is full. */
static __always_inline struct tls_record *tls_record(__u64 session, __u32 space, __u8 received, __u8 kernel)
{
	struct tls_record *record;
	__u64 thread = bpf_get_current_pid_tgid();

	tls_count(TLS_STAT_SEEN);
	record = tls_records.ringbuf_reserve(sizeof(*record));
	if (!record) {
		tls_count(TLS_STAT_LOST);
		return 0;
	}
	record->time = bpf_ktime_get_ns();
	record->session = session;
	record->pid = thread >> 32;
	record->thread = thread;
	record->netns = space;
	record->received = received;
	record->kernel = kernel;
	bpf_probe_read_kernel(record->comm, sizeof(record->comm), (void *)(bpf_get_current_task() + AT_TASK_COMM));
	return record;
}
