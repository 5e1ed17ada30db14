/* Programs for the tests of the kernel adapters: count_packets counts under key 0, sends a sample of the
 * packet's length and tail-calls slot 1, where `second` counts under key 1 + STEP and returns RESULT. */
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>

#ifndef COUNTS_MAX
#define COUNTS_MAX 128
#endif
#ifndef STEP
#define STEP 0
#endif

#ifndef RESULT
#define RESULT TC_ACT_UNSPEC
#endif

#include "programs.h"

/* A kernel sends MLD reports of its own when a link comes up: not what a test sent, so not counted. */
static __always_inline bool unasked(struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_IPV6);
}

int second(struct __sk_buff *skb)
{
	if (unasked(skb))
		return RESULT;
	count(1 + STEP);
	return RESULT;
}

int count_packets(struct __sk_buff *skb)
{
	u32 length = skb->len;

	if (unasked(skb))
		return TC_ACT_UNSPEC;
	count(0);
	samples.ringbuf_output(&length, sizeof(length), 0);
	slots.call(skb, 1);
	return TC_ACT_UNSPEC;
}
