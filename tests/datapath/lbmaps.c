/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The maps of family `lb` and one program: which backend a client gets, for tests of what user space writes and explains. */
#include <uapi/linux/bpf.h>
#include <linux/types.h>
#include "lb/choose.h"
#include "lb/front.h"

struct asked {
	__u8 mac[16]; /* the kernel wants a frame's length */
	struct fib_addr client;
	struct fib_addr vip;
	__be16 cport;
	__be16 vport;
	__u8 proto;
	__u8 outside;
};

/* The backend's id; 0: none, 0xffffffff: no frontend, 0xfffffffe: not admitted. */
int lb_maps(struct xdp_md *ctx)
{
	struct asked *asked = (void *)(long)ctx->data;
	struct lb_config *config = lb_configuration();
	struct fib_addr client, vip;
	struct lb_service *service;
	struct lb_backend *backend;
	struct lb_front *front;
	__be16 cport, vport;
	bool outside;
	__u8 proto;

	if ((void *)(asked + 1) > (void *)(long)ctx->data_end || !config)
		return 0xfffffffd;
	client = asked->client;
	vip = asked->vip;
	cport = asked->cport;
	vport = asked->vport;
	proto = asked->proto;
	outside = asked->outside;
	front = lb_front_find(&vip, vport, proto);
	if (!front)
		return 0xffffffff;
	service = lb_service(front->service);
	if (!service)
		return 0xffffffff;
	outside = outside && front->flags & LB_FRONT_OUTSIDE;
	if (outside && !choose_admits(service, front->service, &client))
		return 0xfffffffe;
	if (service->flags & LB_SVC_AFFINITY)
		cport = 0;
	backend = choose_backend(config, service, front->service, outside, &client,
				 lb_hash(config, &client, cport, &vip, vport, proto));
	return backend ? backend->id : 0;
}
