/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `tls`, version 2: the beginnings of HTTP messages that processes of chosen pods give to TLS, or get from it.
 *
 * Writers: programs (bpf/sockaccel/tls.c, ktls.c) of all but tls_spaces and tls_ports, which the sockaccel service writes. Readers: programs; the
 * service reads tls_records and tls_stats.
 */
#pragma once

#include "lib/likely.h"
#include "lib/maps.h"

#define TLS_HEAD 512 /* bytes that are copied at most */
#define TLS_SOCKS_MAX 65536

enum tls_stat {
	TLS_STAT_SEEN = 0, /* calls of chosen pods that began like an HTTP message */
	TLS_STAT_LOST = 1, /* of which no record could be made: the buffer was full */
	TLS_STAT_HELD = 2, /* sockets that were put where TLS of the kernel is seen */
	TLS_STAT_TAKEN = 3, /* and that could not be: another program has them, or there was no room */
	TLS_STATS = 4,
};

/* A call that reads: where it puts what it reads is known when it begins. */
struct tls_call {
	__u64 buffer;  /* address in the process */
	__u64 size_at; /* address of the number of bytes read; 0: it is what the call returns */
	__u64 session; /* address of the library's object */
};

struct tls_record {
	__u64 time;    /* ns, CLOCK_MONOTONIC */
	__u64 session; /* as in the call; of the kernel's TLS: address of the socket */
	__u32 pid;     /* thread group, in the machine's first namespace */
	__u32 thread;
	__u32 netns;   /* inode number of the network namespace */
	__u16 captured; /* bytes of the call in `head` */
	__u8 received; /* 1: read, 0: written */
	__u8 kernel;   /* 1: encrypted by the kernel */
	char comm[16];
	char head[TLS_HEAD];
};
_Static_assert(sizeof(struct tls_record) == 48 + TLS_HEAD, "ABI");

/* A server's port in the network namespace (cookie) of a chosen pod, whether the pod is client or server. */
struct tls_port {
	__u64 netns;
	__u32 port; /* host order */
	__u32 zero;
};

/* Network namespaces (inode number) of chosen pods. */
FIB_MAP("hash", __u32, __u32, tls_spaces, 4096, BPF_F_NO_PREALLOC);
/* Where the kernel may do TLS: sockets of these are looked at. */
FIB_MAP("hash", struct tls_port, __u32, tls_ports, 16384, BPF_F_NO_PREALLOC);
/* Thread -> call it is in. */
FIB_MAP("lru_hash", __u64, struct tls_call, tls_calls, 8192, 0);
FIB_MAP("percpu_array", __u32, __u64, tls_stats, TLS_STATS, 0);
/* struct tls_record records. */
FIB_RINGBUF(tls_records, 1 << 20);
