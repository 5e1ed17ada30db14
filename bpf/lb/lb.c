/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The balancer's tc programs as one unit. */
#include "lb/slot.c"
#include "lb/uplink.c"
#include "lb/search.c"
#include "lb/reject.c"
#include "lb/icmp.c"
#include "lb/decap.c"
