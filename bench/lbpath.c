/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What packets meet before the balancer under test at XDP. A test run gives each repetition the packet as the one before
 * left it, so these make it anew: take the outer header off, put MACs, addresses, ports and hop count back. fib_same
 * leaves it one flow, fib_spread makes it the next of 65,536, fib_fresh one never seen before. fib_pair does nothing but
 * move the packet's beginning there and back, which is part of what they cost; fib_out moves it, to be moved back by them. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include "lib/likely.h"
#include "lib/maps.h"

FIB_MAP("prog", __u32, __u32, next, 1, 0);
FIB_MAP("array", __u32, __u32, turn, 1, 0);

#define MAC_LOW 0x02000000u /* 02:00:00:00:00:01, as any machine reads it */

/* Ethernet as it was; the IP header follows at once. Null: no room. */
static __always_inline void *restore(struct xdp_md *ctx, __u8 *family)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__be32 *words;
	__u8 *ip = data + ETH_HLEN;
	int outer = 0;

	if (data + ETH_HLEN + 40 > end)
		return 0;
	*family = ip[0] >> 4;
	if (*family == 4 && ip[9] == IPPROTO_IPIP)
		outer = 20;
	else if (*family == 6 && ip[6] == IPPROTO_IPV6)
		outer = 40;
	if (outer) {
		if (bpf_xdp_adjust_head(ctx, outer))
			return 0;
		data = (void *)(long)ctx->data;
		end = (void *)(long)ctx->data_end;
		if (data + ETH_HLEN + 40 > end)
			return 0;
	}
	words = data;
	words[0] = bpf_htonl(MAC_LOW);
	words[1] = bpf_htonl(0x00010200);
	words[2] = bpf_htonl(0x00000002);
	((__be16 *)data)[6] = *family == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	return data + ETH_HLEN;
}

static __always_inline int prepare(struct xdp_md *ctx, __u32 change, __be16 port)
{
	void *end = (void *)(long)ctx->data_end;
	__u8 family;
	__be32 *ip = restore(ctx, &family);
	__be16 *ports;

	end = (void *)(long)ctx->data_end;
	if (!ip || (void *)ip + 44 > end)
		return XDP_ABORTED;
	if (family == 4) {
		((__u8 *)ip)[8] = 64;
		ip[3] = bpf_htonl(0xc0000201) ^ change; /* 192.0.2.1 */
		ip[4] = bpf_htonl(0xc6336401);          /* 198.51.100.1 */
		ports = (void *)ip + 20;
	} else {
		((__u8 *)ip)[7] = 64;
		ip[2] = ip[6] = bpf_htonl(0x20010db8); /* 2001:db8:1::1 to 2001:db8:2::1 */
		ip[3] = bpf_htonl(0x00010000);
		ip[7] = bpf_htonl(0x00020000);
		ip[4] = ip[8] = 0;
		ip[5] = bpf_htonl(1) ^ change;
		ip[9] = bpf_htonl(1);
		ports = (void *)ip + 40;
	}
	/* The payload begins with the frontend's port. */
	if ((void *)(ports + 11) > end)
		return XDP_ABORTED;
	ports[0] = port;
	ports[1] = ports[10];
	ports[8] = bpf_htons(0x1234); /* the checksum */
	next.call(ctx, 0);
	return XDP_ABORTED;
}

int fib_same(struct xdp_md *ctx)
{
	return prepare(ctx, 0, bpf_htons(40000));
}

int fib_spread(struct xdp_md *ctx)
{
	__u32 zero = 0, *count = turn.lookup(&zero);

	if (!count)
		return XDP_ABORTED;
	return prepare(ctx, 0, (__u16)++*count);
}

int fib_fresh(struct xdp_md *ctx)
{
	__u32 zero = 0, *count = turn.lookup(&zero);

	if (!count)
		return XDP_ABORTED;
	++*count;
	return prepare(ctx, bpf_htonl(0x100 + (*count >> 16)), (__u16)*count);
}

int fib_pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

/* There. */
static __always_inline int out(struct xdp_md *ctx, int bytes)
{
	void *data;

	if (bpf_xdp_adjust_head(ctx, -bytes))
		return XDP_ABORTED;
	data = (void *)(long)ctx->data;
	if (data + ETH_HLEN + 40 > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	*(__u8 *)(data + ETH_HLEN) = bytes == 20 ? 0x45 : 0x60;
	if (bytes == 20)
		*(__u8 *)(data + ETH_HLEN + 9) = IPPROTO_IPIP;
	else
		*(__u8 *)(data + ETH_HLEN + 6) = IPPROTO_IPV6;
	return XDP_PASS;
}

int fib_out_v4(struct xdp_md *ctx)
{
	return out(ctx, 20);
}

int fib_out_v6(struct xdp_md *ctx)
{
	return out(ctx, 40);
}

int fib_pair(struct xdp_md *ctx)
{
	return bpf_xdp_adjust_head(ctx, -20) || bpf_xdp_adjust_head(ctx, 20) ? XDP_ABORTED : XDP_PASS;
}
