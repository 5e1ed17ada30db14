/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `tls`, version 1: the beginnings of HTTP messages that processes of chosen pods give to a TLS library, or get from it.
 *
 * Writers: programs (bpf/sockaccel/tls.c) of all but tls_spaces, which the sockaccel service writes. Readers: programs; the service reads
 * tls_records and tls_stats.
 */
#pragma once

#include "lib/likely.h"
#include "lib/maps.h"

#define TLS_HEAD 512 /* bytes that are copied at most */

enum tls_stat {
	TLS_STAT_SEEN = 0, /* calls of chosen pods that began like an HTTP message */
	TLS_STAT_LOST = 1, /* of which no record could be made: the buffer was full */
	TLS_STATS = 2,
};

/* A call that reads: where it puts what it reads is known when it begins. */
struct tls_call {
	__u64 buffer;  /* address in the process */
	__u64 size_at; /* address of the number of bytes read; 0: it is what the call returns */
	__u64 session; /* address of the library's object */
};

struct tls_record {
	__u64 time;    /* ns, CLOCK_MONOTONIC */
	__u64 session; /* as in the call */
	__u32 pid;     /* thread group, in the machine's first namespace */
	__u32 netns;   /* inode number of the network namespace */
	__u32 size;    /* bytes of the call */
	__u16 captured; /* of which so many are in `head` */
	__u16 received; /* 1: read, 0: written */
	char comm[16];
	char head[TLS_HEAD];
};
_Static_assert(sizeof(struct tls_record) == 48 + TLS_HEAD, "ABI");

/* Network namespaces (inode number) of chosen pods. */
FIB_MAP("hash", __u32, __u32, tls_spaces, 4096, BPF_F_NO_PREALLOC);
/* Thread -> call it is in. */
FIB_MAP("lru_hash", __u64, struct tls_call, tls_calls, 8192, 0);
FIB_MAP("percpu_array", __u32, __u64, tls_stats, TLS_STATS, 0);
/* struct tls_record records. */
FIB_RINGBUF(tls_records, 1 << 20);
