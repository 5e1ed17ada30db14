/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A real server's half of direct return, where the kernel has no IPIP devices: takes the outer header off. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>

int fbt_decap(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u8 *ip = data + ETH_HLEN;
	__u64 macs[2];
	int header = 0;

	if (data + ETH_HLEN + 40 > end)
		return XDP_PASS;
	if (ip[0] == 0x45 && ip[9] == IPPROTO_IPIP)
		header = 20;
	else if (ip[0] >> 4 == 6 && ip[6] == IPPROTO_IPV6)
		header = 40;
	if (!header)
		return XDP_PASS;
	macs[0] = *(__u64 *)data;
	macs[1] = *(__u32 *)(data + 8) | (__u64)*(__u16 *)(data + 12) << 32;
	if (bpf_xdp_adjust_head(ctx, header))
		return XDP_DROP;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + ETH_HLEN > end)
		return XDP_DROP;
	*(__u64 *)data = macs[0];
	*(__u32 *)(data + 8) = macs[1];
	*(__u16 *)(data + 12) = macs[1] >> 32;
	return XDP_PASS;
}
