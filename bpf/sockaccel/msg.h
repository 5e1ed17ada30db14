/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What becomes of one send(). */
#pragma once

/* Whether both ends are under the policies they were judged under. What has changed is noted. */
static __always_inline bool sa_same_policies(struct sa_pair *pair)
{
	bool same = true;

#pragma unroll
	for (int side = 0; side < 2; side++) {
		struct sa_end *end = &pair->ends[side];
		__u32 id = end->endpoint;
		struct pol_ep *now = pol_eps.lookup(&id);

		if (!now)
			continue;

		__u64 policy = *(volatile __u64 *)&now->policy;
		__u32 flags = *(volatile __u32 *)&now->flags;

		if (end->policy != policy || end->policy_flags != flags) {
			end->policy = policy;
			end->policy_flags = flags;
			same = false;
		}
	}
	return same;
}

/* Whether nothing has changed since the pair was judged: the service's configuration, both ends' policies, and which processes splice. What has
 * is noted. */
static __always_inline bool sa_still_judged(struct sa_pair *pair, const struct sa_config *config)
{
	bool same = pair->epoch == config->epoch;
	__u32 zero = 0, *splicers = sa_splicing.lookup(&zero);

	if (splicers && unlikely(pair->splicers != *splicers)) {
		pair->splicers = *splicers;
		same = false;
	}
	return sa_same_policies(pair) && same;
}

/* Back to TCP, until packets have got through again. An end that is about to hand over on another CPU notices (sa_shorten). */
static __always_inline void sa_back(struct sa_pair *pair)
{
	pair->proofs = 0;
	__sync_fetch_and_add(&pair->ends[0].judged, 1);
	__sync_fetch_and_add(&pair->ends[1].judged, 1);
	pair->ends[0].mode = pair->ends[1].mode = SA_TCP;
}

/* From here on ends[side] hands over, unless the other end has sent both back since it was `judged`. */
static __always_inline bool sa_shorten(struct sa_pair *pair, __u32 side, __u32 judged)
{
	struct sa_end *me = &pair->ends[side];

	me->seq = sa_read32(me->sock, AT_TCP_WRITE_SEQ);
	me->mode = SA_SHORT;
	__sync_fetch_and_add(&pair->proofs, 1); /* for the barrier that it is */
	if (likely(*(volatile __u32 *)&me->judged == judged))
		return true;
	me->mode = SA_TCP;
	return false;
}

/* What has changed may be against it. */
static __always_inline void sa_judge(struct sa_pair *pair, const struct sa_config *config)
{
	__u64 cookie = pair->ends[0].cookie;

	pair->epoch = config->epoch;
	sa_back(pair);
	if (config->flags & SA_CFG_ON && config->classes & 1U << (pair->class & 31) && !sa_off.lookup(&cookie))
		pair->flags &= ~SA_PAIR_OFF;
	else
		pair->flags |= SA_PAIR_OFF;
}

#define SA_WATCHED_TURNS 1000
#define SA_SEEN_TURNS 8

/* Whether nobody but who has read last waits at an end. Two at once are left to TCP for good. */
static __always_inline bool sa_reader_is_alone(struct sa_pair *pair, const struct sa_end *end)
{
	enum sa_waiters waiters = sa_waiters(end);

	if (unlikely(waiters == SA_SEVERAL))
		sa_finish(pair, SA_READS);
	return waiters < SA_STRANGER;
}

/* The same before anything is handed over. Where calls wait, it is better to see the reader do so than to see nobody, for some turns. */
static __always_inline bool sa_reader_is_known(struct sa_pair *pair, const struct sa_end *end, const struct sa_config *config)
{
	enum sa_waiters waiters = sa_waiters(end);
	__u32 me = bpf_get_current_pid_tgid();

	if (unlikely(waiters == SA_SEVERAL))
		sa_finish(pair, SA_READS);
	if (waiters == SA_NOBODY)
		return !(end->reader & SA_WAITS) || (end->reader & ~SA_WAITS) == me || pair->proofs > config->proofs + SA_SEEN_TURNS;
	return waiters == SA_KNOWN;
}

/* Whether `size` bytes of ends[side] may be handed over. Its socket, `tcp`, is locked. */
static __always_inline bool sa_may_pass(struct sa_pair *pair, __u32 side, void *tcp, __u32 size)
{
	struct sa_end *me = &pair->ends[side], *other = &pair->ends[!side];
	bool turn = pair->speaker != side;
	struct sa_config *config;
	__u32 zero = 0, judged, process;
	enum sa_call call;

	if (unlikely(pair->ended || !other->cookie))
		return false;
	config = sa_config.lookup(&zero);
	if (!config)
		return false;
	if (turn) {
		pair->speaker = side;
		pair->run = 0;
	}
	pair->run += size;
	if (pair->run > config->run_bytes) {
		sa_finish(pair, SA_BULK);
		return false;
	}
	call = sa_sending();
	if (unlikely(call != SA_CALL_PLAIN)) {
		if (call == SA_CALL_SPECIAL)
			sa_finish(pair, SA_SENDS);
		sa_back(pair);
		return false;
	}
	if (unlikely(!sa_still_judged(pair, config)))
		sa_judge(pair, config);
	judged = *(volatile __u32 *)&me->judged;
	if (unlikely(pair->flags & SA_PAIR_OFF))
		return false;
	if (likely(me->mode == SA_SHORT)) {
		if (unlikely(sa_is_layered(tcp))) {
			sa_finish(pair, SA_OPTION);
			return false;
		}
		/* Who speaks without reading what he is told is left to TCP, which has a limit. */
		other->unread += size + SA_MESSAGE;
		if (unlikely(other->unread > config->run_bytes)) {
			other->unread = sa_waiting(other) + size + SA_MESSAGE;
			if (other->unread > config->run_bytes) {
				sa_finish(pair, SA_BEHIND);
				return false;
			}
		}
		if (!turn)
			return true;
		if (unlikely(sa_is_special(other))) {
			sa_finish(pair, SA_OPTION);
			return false;
		}
		if (unlikely(sa_is_short(tcp))) {
			sa_back(pair);
			return false;
		}
		/* One that was too late may get to wait only now. */
		if (unlikely(pair->proofs < config->proofs + SA_WATCHED_TURNS)) {
			__sync_fetch_and_add(&pair->proofs, 1);
			if (!sa_reader_is_alone(pair, other))
				return false;
		}
		/* Nothing is to wait before what goes by TCP, if that can be helped: who splices now would have that first. */
		if (unlikely(bpf_ktime_get_coarse_ns() - pair->beat > config->beat_ns) && !sa_queue(other->sock)) {
			pair->beat = bpf_ktime_get_coarse_ns();
			sa_back(pair);
			return false;
		}
		return true;
	}
	/* Who sends before he has been told anything will read as his socket says: so he is left alone before he waits. */
	if (sa_must_not_wait(pair->class, config) &&
	    ((me->reader | other->reader) & SA_WAITS || (!me->reads && !other->tcp_sends && sa_is_blocking(me)))) {
		sa_finish(pair, SA_READS);
		return false;
	}
	if (!turn)
		return false;
	__sync_fetch_and_add(&pair->proofs, 1);
	if (!sa_reader_is_known(pair, other, config) || pair->proofs <= config->proofs || !other->reads || !(config->flags & SA_CFG_CALLS) || !sa_all_read(me, other) || sa_is_short(tcp))
		return false;
	if (sa_is_special(me) || sa_is_special(other)) {
		sa_finish(pair, SA_OPTION);
		return false;
	}
	process = other->reads;
	if (sa_splicers.lookup(&process)) {
		sa_finish(pair, SA_READS);
		return false;
	}
	if (!sa_shorten(pair, side, judged))
		return false;
	other->unread = size + SA_MESSAGE;
	if (!pair->beat)
		pair->beat = bpf_ktime_get_coarse_ns();
	return true;
}

/* Whether a socket may write at all: if not, TCP says so. */
static __always_inline bool sa_is_open(const struct bpf_sock *sk)
{
	return sk->state == SA_TCP_ESTABLISHED || sk->state == SA_TCP_CLOSE_WAIT;
}

/* The last word before what is sent is handed over. Who looks whether a queue will stay empty looks at `ended` first and at the task then; here it
 * is the other way round: one of the two sees what the other has written. */
static __always_inline bool sa_hand_over(struct sa_pair *pair, struct sa_end *me)
{
	__u64 task = bpf_get_current_task();

	if (unlikely(me->task != task)) {
		me->task = task;
		__sync_fetch_and_add(&me->tasks, 1); /* and a barrier */
	}
	return !*(volatile __u32 *)&pair->ended;
}

enum sa_way {
	SA_BY_TCP,
	SA_PAST,
	SA_NOWHERE,
};

/* The reader is stuck before something that was handed over: `size` bytes more must not get there by TCP before that is read. */
static __always_inline enum sa_way sa_behind(struct sa_pair *pair, struct sa_end *me, struct sa_end *other, __u32 size)
{
	struct sa_config *config;
	__u32 zero = 0;

	if (other->stuck == SA_OVERTAKEN)
		return SA_NOWHERE;
	/* What has been sent before this is there, or has been read. */
	if (!sa_queue(other->sock)) {
		other->stuck = SA_FREE;
		return SA_BY_TCP;
	}
	config = sa_config.lookup(&zero);
	other->unread += size + SA_MESSAGE;
	if (!config || other->unread > config->run_bytes || !sa_same_policies(pair))
		return SA_NOWHERE;
	sa_hand_over(pair, me);
	return SA_PAST;
}

/* What is not handed over goes the way it would have gone, but for what would overtake (sa_behind): that send() fails, with EACCES. */
int fib_sa_msg(struct sk_msg_md *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sa_mine *mine = sk ? sa_mine.sk_storage_get(sk, 0, 0) : 0;
	struct sa_pair *pair = mine ? sa_pairs.lookup(&mine->pair) : 0;
	__u32 size = ctx->size, side;
	struct sa_end *me, *other;
	enum sa_way way;
	bool first;
	void *tcp;
	__u64 to;

	if (!pair || !sa_is_open(sk))
		return SK_PASS;
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp)
		return SK_PASS;
	side = mine->side & 1;
	me = &pair->ends[side];
	other = &pair->ends[!side];
	to = other->cookie;
	if (unlikely(pair->ended))
		sa_note_settled(pair, side);
	first = !pair->ends[0].tasks && !pair->ends[1].tasks;
	way = sa_may_pass(pair, side, tcp, size) && sa_hand_over(pair, me) ? SA_PAST : SA_BY_TCP;
	if (unlikely(way == SA_BY_TCP && pair->ended && other->stuck))
		way = sa_behind(pair, me, other, size);
	if (unlikely(way == SA_NOWHERE))
		return SK_DROP;
	if (way == SA_BY_TCP || sa_socks.msg_redirect_hash(ctx, &to, BPF_F_INGRESS) != SK_PASS) {
		me->mode = SA_TCP;
		me->tcp_bytes += size;
		me->tcp_sends++;
		sa_count(SA_STAT_TCP_BYTES, size);
		sa_count(SA_STAT_TCP_SENDS, 1);
		return SK_PASS;
	}
	me->bytes += size;
	me->sends++;
	sa_count(SA_STAT_BYTES, size);
	sa_count(SA_STAT_SENDS, 1);
	if (unlikely(first)) {
		sa_count(SA_STAT_SHORTENED, 1);
		sa_tell(SA_EVENT_SHORT, pair);
	}
	return SK_PASS;
}
