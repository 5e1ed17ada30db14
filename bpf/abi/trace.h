/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `trace`, version 1: what processes execute and connect to, told to user space as it happens.
 *
 * The programs (identity/trace.c) are attached only while somebody watches. Numbers are in host order unless the type
 * says otherwise; processes are numbered as the identity service sees them.
 */
#pragma once

#include "abi/addr.h"
#include "lib/maps.h"

enum trace_kind {
	TRACE_EXEC = 0,
	TRACE_CONNECT = 1,
	TRACE_KINDS = 2,
};

#define TRACE_PATH_MAX 1024 /* bytes of a path, with the zero at its end */
#define TRACE_ARGS_MAX 4096 /* bytes of arguments, as in fibril.workload.v1 */
#define TRACE_OPENING_MAX 1024

/* Who did it. */
struct trace_who {
	__u64 time;   /* ns, CLOCK_MONOTONIC */
	__u64 cgroup; /* cgroup v2 id */
	__u64 netns;  /* cookie */
	__u32 kind;   /* enum trace_kind */
	__u32 endpoint; /* 0: of no pod of this node */
	__u32 pid;    /* of the thread group; 0: not in sight of the service */
	__u32 parent;
	__u32 uid;    /* in the initial user namespace */
	__u32 pad;
	char comm[16];
};
_Static_assert(sizeof(struct trace_who) == 64, "ABI");

/* A program was executed. The record ends after the last byte of `data` in use. */
struct trace_exec {
	struct trace_who who;
	__u16 path_len; /* bytes at the start of data, no zero at the end */
	__u16 args_len; /* bytes behind it: zero-terminated arguments, the last perhaps cut; 0: could not be read */
	__u32 pad;
	char data[TRACE_PATH_MAX + TRACE_ARGS_MAX];
};
_Static_assert(sizeof(struct trace_exec) == 64 + 8 + 5120, "ABI");

/* A TCP connection is being opened, or a UDP socket connected. */
struct trace_connect {
	struct trace_who who;
	struct fib_addr src; /* UDP: zero */
	struct fib_addr dst;
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 pad[3];
};
_Static_assert(sizeof(struct trace_connect) == 64 + 40, "ABI");

/* What is wanted of one kind; the kernel leaves out the rest. */
struct trace_wanted {
	__u32 host;     /* 1: processes of no pod, too */
	__u32 endpoint; /* only of this one; 0: of all */
};

/* Records of both kinds. */
FIB_RINGBUF(tr_events, 1 << 20);
/* enum trace_kind -> what is wanted. */
FIB_MAP("array", __u32, struct trace_wanted, tr_wanted, TRACE_KINDS, 0);
/* enum trace_kind -> records that found tr_events full. */
FIB_MAP("percpu_array", __u32, __u64, tr_lost, TRACE_KINDS, 0);
/* Socket cookie -> TCP connection whose source is not chosen yet; of those that fail before that, the oldest go. */
FIB_MAP("lru_hash", __u64, struct trace_connect, tr_opening, TRACE_OPENING_MAX, 0);
/* Room to put an execution together: the kernel never runs tr_exec inside itself on one CPU. */
FIB_MAP("percpu_array", __u32, struct trace_exec, tr_scratch, 1, 0);
