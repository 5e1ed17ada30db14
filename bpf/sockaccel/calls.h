/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* How the processes at paired sockets read and write: tracepoints, behind each call of every socket of the machine, attached only while there
 * are pairs (SA_CFG_CALLS). Calls that behave otherwise on the short way end the pair; and none is shortened before its reader has been
 * seen to read plainly: who splices is never seen. */
#pragma once

#define SA_MSG_OOB 0x1
#define SA_MSG_TRUNC 0x20
#define SA_MSG_WAITALL 0x100
#define SA_MSG_ZEROCOPY 0x4000000

/* Whether a socket is in no map of sockets, and so in no pair: a load, where looking for its storage would be a call. */
static __always_inline bool sa_is_plain(__u64 sk)
{
	return !*(volatile __u64 *)(sk + AT_SK_USER_DATA);
}

/* (sk, length, flags). A peek is fine. */
int fib_sa_recv(__u64 *ctx)
{
	__u32 special = ctx[2] & (SA_MSG_OOB | SA_MSG_TRUNC | SA_MSG_WAITALL);
	struct sa_mine *mine;
	struct sa_pair *pair;

	if (likely(sa_is_plain(ctx[0])))
		return 0;
	mine = sa_mine.sk_storage_get((void *)ctx[0], 0, 0);
	if (!mine || (mine->reads && !special))
		return 0;
	pair = sa_pairs.lookup(&mine->pair);
	if (!pair)
		return 0;
	if (special) {
		sa_finish(pair, SA_READS);
	} else {
		mine->reads = 1;
		pair->ends[mine->side & 1].reads = 1;
	}
	return 0;
}

/* (sk, length, flags) */
int fib_sa_send(__u64 *ctx)
{
	struct sa_mine *mine;
	struct sa_pair *pair;

	if (likely(!(ctx[2] & (SA_MSG_OOB | SA_MSG_ZEROCOPY))))
		return 0;
	mine = sa_mine.sk_storage_get((void *)ctx[0], 0, 0);
	pair = mine ? sa_pairs.lookup(&mine->pair) : 0;
	if (pair)
		sa_finish(pair, SA_SENDS);
	return 0;
}
