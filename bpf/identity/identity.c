/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The identity service's packet programs as one unit. */
#include "identity/remote.c"
#include "identity/from_overlay.c"
#include "identity/from_uplink.c"
#include "identity/from_host.c"
