/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* All programs of the ipam service as one unit: compiling costs 0.2 s a unit, a further program next to
 * nothing. */
#include "ipam/from_pod.c"
#include "ipam/to_pod.c"
#include "ipam/forward.c"
#include "ipam/neighbour.c"
