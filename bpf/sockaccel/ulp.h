/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A protocol on top of a paired socket (TCP_ULP: TLS of the kernel), seen before the kernel sets it.
 *
 * What is handed over is read as it was sent: a reader whose kernel decrypts would have it encrypted. So the pair ends here, and nobody is let in
 * as long as something may wait to be read. A TLS library that is refused goes on without the kernel.
 */
#pragma once

#define SA_SOL_TCP 6
#define SA_TCP_ULP 31

/* Before each setsockopt() of every socket of the control group, with its lock held. 0: EPERM. */
int fib_sa_ulp(struct bpf_sockopt *ctx)
{
	struct sa_mine *mine;
	struct sa_pair *pair;
	__u64 sock = 0;

	if (likely(ctx->level != SA_SOL_TCP || ctx->optname != SA_TCP_ULP)) {
		/* Values over a page are not all here. 0: the kernel takes what the process gave. */
		if (unlikely(ctx->optlen > (__s64)(ctx->optval_end - ctx->optval)))
			ctx->optlen = 0;
		return 1;
	}
	mine = sa_mine.sk_storage_get(ctx->sk, 0, 0);
	if (!mine)
		return 1;
	pair = sa_pairs.lookup(&mine->pair);
	if (!pair) {
		/* Should its server be about to make one: it is never seen to read, and so nothing is handed to it. */
		mine->pair = 0;
		/* Its other end may have left something, and gone. The verifier has no other way from a socket to its address. */
		bpf_probe_read_kernel(&sock, sizeof(sock), (void *)ctx + AT_SOCKOPT_SK);
		return !sa_queue(sock);
	}
	sa_finish(pair, SA_OPTION);
	/* A sender on another CPU sees that, or is seen (sa_hand_over). */
	__sync_fetch_and_add(&pair->proofs, 1);
	return !pair->ends[mine->side & 1].stuck && sa_is_empty(pair, mine->side);
}
