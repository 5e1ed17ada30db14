/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What processes execute and connect to, named by pod in the kernel, so that a process that is gone at once
 * still has a name.
 *
 * tr_exec         raw tracepoint sched_process_exec
 * tr_connect4, 6  cgroup hooks of connect(2): TCP and UDP
 * tr_tcp_connect  sock_ops of the same sockets: here TCP's source address and port are known
 *
 * Nothing is ever refused or changed. Where fields of the kernel's own structures lie is given by AT_* macros, which
 * user space takes from the kernel's type information (services/identity/workload/programs.py).
 */
#include <uapi/linux/in.h>

#include "abi/endpoint.h"
#include "abi/trace.h"

#define CGROUP_LEVELS 16 /* ancestors looked at, from the root; a process's own group is looked at in any depth */
#define PID_LEVELS 8     /* nesting of pid namespaces */

static __always_inline __u64 read64(__u64 object, __u32 at)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(object + at));
	return value;
}

static __always_inline __u32 read32(__u64 object, __u32 at)
{
	__u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(object + at));
	return value;
}

/* The number of a task's thread group in the service's pid namespace, 0 if it has none there. */
static __always_inline __u32 number_of(__u64 task)
{
	__u64 pid = read64(read64(task, AT_TASK_LEADER), AT_TASK_PID);
	__u32 deepest = read32(pid, AT_PID_LEVEL);

#pragma unroll
	for (int level = 0; level < PID_LEVELS; level++) {
		__u64 numbers = pid + AT_PID_NUMBERS + level * SIZE_UPID;

		if (level > deepest)
			break;
		if (read32(read64(numbers, AT_UPID_NS), AT_PIDNS_INUM) == PIDNS)
			return read32(numbers, AT_UPID_NR);
	}
	return 0;
}

/* The pod of the current process: by its control group or the nearest one above, else by network namespace. */
static __always_inline __u32 endpoint_of(__u64 cgroup, __u64 netns)
{
	__u32 *found = ep_cgroup.lookup(&cgroup), nearest = 0;

	if (found)
		return *found;
	for (int level = 1; level < CGROUP_LEVELS; level++) {
		__u64 ancestor = bpf_get_current_ancestor_cgroup_id(level);

		if (!ancestor)
			break;
		found = ep_cgroup.lookup(&ancestor);
		if (found)
			nearest = *found;
	}
	if (nearest)
		return nearest;
	found = ep_netns.lookup(&netns);
	return found ? *found : 0;
}

/* Fill in who the current process is; whether anybody wants to know. */
static __always_inline bool identify(struct trace_who *who, __u32 kind, __u64 netns)
{
	struct trace_wanted *wanted = tr_wanted.lookup(&kind);
	__u64 task = bpf_get_current_task();

	who->time = bpf_ktime_get_ns();
	who->cgroup = bpf_get_current_cgroup_id();
	who->netns = netns;
	who->kind = kind;
	who->endpoint = endpoint_of(who->cgroup, netns);
	if (!wanted)
		return false;
	if (wanted->endpoint ? wanted->endpoint != who->endpoint : !who->endpoint && !wanted->host)
		return false;
	who->pid = number_of(task);
	who->parent = number_of(read64(task, AT_TASK_PARENT));
	who->uid = bpf_get_current_uid_gid();
	who->pad = 0;
	bpf_get_current_comm(who->comm, sizeof(who->comm));
	return true;
}

static __always_inline void lose(__u32 kind)
{
	__u64 *lost = tr_lost.lookup(&kind);

	if (lost)
		*lost += 1;
}

int tr_exec(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 task = ctx->args[0], program = ctx->args[2];
	__u64 netns = read64(read64(read64(task, AT_TASK_NSPROXY), AT_NSPROXY_NET), AT_NET_COOKIE);
	__u64 mm = read64(task, AT_TASK_MM);
	__u64 start = read64(mm, AT_MM_ARG_START), size = read64(mm, AT_MM_ARG_END) - start;
	__u32 zero = 0;
	struct trace_exec *event = tr_scratch.lookup(&zero);

	if (!event || !identify(&event->who, TRACE_EXEC, netns))
		return 0;
	long path = bpf_probe_read_kernel_str(event->data, TRACE_PATH_MAX, (void *)read64(program, AT_BINPRM_FILENAME));

	/* The masks change nothing: they are for the verifier. */
	__u32 path_len = path > 0 ? (path - 1) & (TRACE_PATH_MAX - 1) : 0;
	__u32 args_len = size > TRACE_ARGS_MAX ? TRACE_ARGS_MAX : size;

	/* The kernel has just put the arguments there, so the pages are present: this does not fail for being
	 * unable to wait for them. */
	if (bpf_probe_read_user(event->data + path_len, args_len, (void *)start))
		args_len = 0;
	event->path_len = path_len;
	event->args_len = args_len;
	event->pad = 0;
	if (tr_events.ringbuf_output(event, __builtin_offsetof(struct trace_exec, data) + path_len + args_len, 0))
		lose(TRACE_EXEC);
	return 0;
}

/* connect(2) on a socket of either family. Its answer must be "allowed". */
static __always_inline int connecting(struct bpf_sock_addr *ctx, const struct fib_addr *to)
{
	struct trace_connect event = {.dst = *to, .dport = bpf_ntohs(ctx->user_port), .proto = ctx->protocol};

	if (event.proto != IPPROTO_TCP && event.proto != IPPROTO_UDP)
		return 1;
	if (!identify(&event.who, TRACE_CONNECT, bpf_get_netns_cookie(ctx)))
		return 1;
	if (event.proto == IPPROTO_TCP) {
		__u64 cookie = bpf_get_socket_cookie(ctx);

		tr_opening.update(&cookie, &event);
	} else if (tr_events.ringbuf_output(&event, sizeof(event), 0)) {
		lose(TRACE_CONNECT);
	}
	return 1;
}

int tr_connect4(struct bpf_sock_addr *ctx)
{
	struct fib_addr to;

	fib_addr_set_v4(&to, ctx->user_ip4);
	return connecting(ctx, &to);
}

int tr_connect6(struct bpf_sock_addr *ctx)
{
	struct fib_addr to = {
		.w = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]},
	};

	return connecting(ctx, &to);
}

/* The reply of a sock_ops program is an option of the connection: it is never touched here. */
int tr_tcp_connect(struct bpf_sock_ops *ctx)
{
	if (ctx->op != BPF_SOCK_OPS_TCP_CONNECT_CB)
		return 1;

	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct trace_connect *event = tr_opening.lookup(&cookie);

	if (!event)
		return 1;
	if (fib_addr_is_v4(&event->dst)) { /* of an IPv6 socket, too */
		fib_addr_set_v4(&event->src, ctx->local_ip4);
	} else {
		event->src.w[0] = ctx->local_ip6[0];
		event->src.w[1] = ctx->local_ip6[1];
		event->src.w[2] = ctx->local_ip6[2];
		event->src.w[3] = ctx->local_ip6[3];
	}
	event->sport = ctx->local_port;
	if (tr_events.ringbuf_output(event, sizeof(*event), 0))
		lose(TRACE_CONNECT);
	tr_opening.delete(&cookie);
	return 1;
}
