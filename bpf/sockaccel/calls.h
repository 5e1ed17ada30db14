/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* How the processes at paired sockets read and write.
 *
 * Reading is seen by a tracepoint behind each recv() of every socket of the machine, attached only while there are pairs (SA_CFG_CALLS). Calls
 * that behave otherwise on the short way end the pair; and none is shortened before its reader has been seen to read plainly.
 *
 * Who splices takes what came by TCP, and not what was handed over before it: it would read in the wrong order, and the end too early. It is
 * seen where room is made after each read of what came by TCP, and then nothing is handed to the whole process any more: many a proxy reads the
 * beginning plainly and splices the rest. Nor is anything handed to processes of that program in that namespace that begin later. The first time
 * it may be too late: something waits. Then nothing is sent by TCP before that is read (enum sa_stuck).
 *
 * What is written is seen before it is sent: the process is in the system call, and what it gave lies at the top of its kernel stack. AT_REGS_*
 * and the calls' numbers are the machine's (services/sockaccel/install.py).
 */
#pragma once

#define SA_MSG_OOB 0x1
#define SA_MSG_TRUNC 0x20
#define SA_MSG_DONTWAIT 0x40
#define SA_MSG_WAITALL 0x100
#define SA_MSG_ZEROCOPY 0x4000000
#define SA_O_NONBLOCK 0x800
#define SA_MUCH 512 /* bytes */
#define SA_REG(regs, name) (*(volatile __u32 *)((regs) + AT_REGS_##name)) /* all that is asked for */

/* Whether a socket is in no map of sockets, and so in no pair: a load, where looking for its storage would be a call. */
static __always_inline bool sa_is_plain(__u64 sk)
{
	return !*(volatile __u64 *)(sk + AT_SK_USER_DATA);
}

/* Nothing is handed to this process any more. Whether that is new. */
static __always_inline bool sa_note_splicer(void)
{
	__u32 process = bpf_get_current_pid_tgid() >> 32, zero = 0, one = 1, *known;

	if (sa_splicers.lookup(&process))
		return false;
	sa_splicers.update(&process, &one);
	known = sa_splicing.lookup(&zero);
	if (known)
		__sync_fetch_and_add(known, 1);
	return true;
}

/* The program that the process at an end runs: threads have names of their own. */
static __always_inline void sa_program(const struct sa_end *end, struct sa_program *program)
{
	__u64 leader = sa_read64(bpf_get_current_task(), AT_TASK_LEADER);

	program->netns = end->netns;
	program->uid = end->uid;
	bpf_probe_read_kernel_str(program->name, sizeof(program->name), (void *)(leader + AT_TASK_COMM));
}

/* Whether it has spliced before. HAProxy reads the beginning of each answer plainly and may splice the rest (option splice-auto): the first time
 * would be one too late. */
static __always_inline bool sa_is_known_to_splice(const struct sa_end *end)
{
	struct sa_program program = {};
	const char *name = program.name;

	sa_program(end, &program);
	return (name[0] == 'h' && name[1] == 'a' && name[2] == 'p' && name[3] == 'r' && name[4] == 'o' && name[5] == 'x' && name[6] == 'y' &&
		!name[7]) ||
	       sa_programs.lookup(&program);
}

/* Whether nobody may wait in recv() at the ends of pairs of a class: what wakes him without data, a signal, gives EAGAIN there. */
static __always_inline bool sa_must_not_wait(__u32 class, const struct sa_config *config)
{
	return config->flags & SA_CFG_NONBLOCKING && config->nonblocking & 1U << (class & 31);
}

/* Servers that wait are known by where they listen, so that their next connections are no candidates. */
static __always_inline __u64 sa_listener(__u64 netns, __u32 port)
{
	return netns << 16 | port;
}

/* Whether calls at a socket wait unless they say otherwise. */
static __always_inline bool sa_is_blocking(const struct sa_end *end)
{
	__u64 file = sa_read64(sa_read64(end->sock, AT_SK_SOCKET), AT_SOCKET_FILE);

	return file && !(sa_read32(file, AT_FILE_FLAGS) & SA_O_NONBLOCK);
}

/* (sk, length, flags). A peek is fine. */
int fib_sa_recv(__u64 *ctx)
{
	__u32 special, process, reader, zero = 0, one = 1;
	struct sa_config *config;
	struct sa_mine *mine;
	struct sa_pair *pair;
	__u64 task, listener;
	struct sa_end *me;

	/* Before any call: this is behind each recv() of the machine. */
	if (likely(sa_is_plain(ctx[0])))
		return 0;
	special = ctx[2] & (SA_MSG_OOB | SA_MSG_TRUNC | SA_MSG_WAITALL);
	task = bpf_get_current_pid_tgid();
	process = task >> 32;
	reader = (__u32)task | (ctx[2] & SA_MSG_DONTWAIT ? 0 : SA_WAITS);
	mine = sa_mine.sk_storage_get((void *)ctx[0], 0, 0);
	/* Looked at again when another reads, or much is read, which may be the end of the pair. */
	if (!mine || (mine->reader == reader && !special && (int)ctx[1] < SA_MUCH))
		return 0;
	pair = sa_pairs.lookup(&mine->pair);
	if (!pair)
		return 0;
	me = &pair->ends[mine->side & 1];
	if (unlikely(pair->ended)) {
		sa_note_settled(pair, mine->side);
		if (me->stuck == SA_STUCK && !sa_queue(ctx[0]))
			me->stuck = SA_DOUBT;
	}
	config = sa_config.lookup(&zero);
	if (reader & SA_WAITS && config && sa_must_not_wait(pair->class, config)) {
		sa_finish(pair, SA_READS);
		if (mine->side) {
			listener = sa_listener(me->netns, me->port);
			sa_blocking.update(&listener, &one);
		}
	} else if (special || sa_splicers.lookup(&process)) {
		sa_finish(pair, SA_READS);
	} else if (!me->reads && sa_is_known_to_splice(me)) {
		sa_note_splicer();
		sa_finish(pair, SA_READS);
	} else {
		me->reader = reader;
		mine->reader = reader;
		__sync_fetch_and_add(&me->readers, 1); /* and a barrier */
		/* Two at once: whoever comes next. */
		if (unlikely(*(volatile __u32 *)&me->reader != *(volatile __u32 *)&mine->reader))
			mine->reader = me->reader = 0;
		me->reads = process;
	}
	return 0;
}

static void *(*sa_current_task)(void) = (void *)BPF_FUNC_get_current_task_btf;
/* At the top of its kernel stack, whatever size that has, and whatever the machine keeps above. */
static void *(*sa_registers_of)(void *task) = (void *)BPF_FUNC_task_pt_regs;

/* Whether they are those of a system call that the process is in. */
static __always_inline bool sa_is_in_call(void *regs)
{
	return (SA_REG(regs, MODE) & SA_MODE_MASK) == SA_MODE_USER;
}

enum sa_call {
	SA_CALL_PLAIN,
	SA_CALL_SPECIAL, /* with flags that the short way does not know */
	SA_CALL_UNKNOWN, /* no call known here: of another kind, of another machine's programs, io_uring, the kernel's own */
};

static __always_inline enum sa_call sa_receiving(void)
{
	void *regs = sa_registers_of(sa_current_task());
	__u32 flags;

	if (!sa_is_in_call(regs))
		return SA_CALL_UNKNOWN;
	switch (SA_REG(regs, CALL)) {
	case SA_NR_READ:
	case SA_NR_READV:
		return SA_CALL_PLAIN;
	case SA_NR_RECVFROM:
	case SA_NR_RECVMMSG:
		flags = SA_REG(regs, FOURTH);
		break;
	case SA_NR_RECVMSG:
		flags = SA_REG(regs, THIRD);
		break;
	default:
		return SA_CALL_UNKNOWN;
	}
	return flags & SA_MSG_WAITALL ? SA_CALL_SPECIAL : SA_CALL_PLAIN;
}

/* (sk): something that came by TCP has been read, or looked for, by a call that may go on: one that waits for all, or for as much as
 * SO_RCVLOWAT says now, would not see what is handed over meanwhile. */
int fib_sa_reading(__u64 *ctx)
{
	enum sa_call call;
	struct sa_mine *mine;
	struct sa_pair *pair;
	struct sa_program program = {};
	struct sa_end *me;
	__u32 stuck, one = 1;

	if (likely(sa_is_plain(ctx[0])))
		return 0;
	call = sa_receiving();
	if (likely(call == SA_CALL_PLAIN) && likely(*(volatile __u32 *)(ctx[0] + AT_SK_RCVLOWAT) <= 1))
		return 0;
	mine = sa_mine.sk_storage_get((void *)ctx[0], 0, 0);
	pair = mine ? sa_pairs.lookup(&mine->pair) : 0;
	if (!pair)
		return 0;
	me = &pair->ends[mine->side & 1];
	if (call == SA_CALL_UNKNOWN) {
		if (sa_note_splicer()) {
			sa_program(me, &program);
			sa_programs.update(&program, &one);
		}
		mine->reader = 0;
		/* In this order: who sends and sees that the pair has ended sees why. */
		if (me->stuck == SA_FREE)
			me->stuck = SA_DOUBT;
		__sync_fetch_and_add(&pair->proofs, 1); /* for the barrier that it is */
	}
	sa_finish(pair, SA_READS);
	if (call == SA_CALL_UNKNOWN) {
		__sync_fetch_and_add(&pair->proofs, 1);
		if (sa_is_empty(pair, mine->side)) {
			me->stuck = me->stuck == SA_OVERTAKEN ? SA_OVERTAKEN : SA_FREE;
		} else if (sa_queue(ctx[0])) {
			stuck = sa_read32(ctx[0], AT_TCP_COPIED_SEQ) == pair->ends[!(mine->side & 1)].seq ? SA_STUCK : SA_OVERTAKEN;
			if (me->stuck != stuck) {
				me->stuck = stuck;
				sa_tell(SA_EVENT_STUCK, pair);
			}
		}
	}
	return 0;
}

static __always_inline enum sa_call sa_sending(void)
{
	void *regs = sa_registers_of(sa_current_task());
	__u32 flags;

	if (!sa_is_in_call(regs))
		return SA_CALL_UNKNOWN;
	switch (SA_REG(regs, CALL)) {
	case SA_NR_WRITE:
	case SA_NR_WRITEV:
		return SA_CALL_PLAIN;
	case SA_NR_SENDTO:
	case SA_NR_SENDMMSG:
		flags = SA_REG(regs, FOURTH);
		break;
	case SA_NR_SENDMSG:
		flags = SA_REG(regs, THIRD);
		break;
	default:
		return SA_CALL_UNKNOWN;
	}
	return flags & (SA_MSG_OOB | SA_MSG_ZEROCOPY) ? SA_CALL_SPECIAL : SA_CALL_PLAIN;
}
