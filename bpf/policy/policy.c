/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The policy service's programs as one unit. */
#include "policy/slots.c"
#include "policy/decide.c"
#include "policy/host.c"
#include "policy/related.c"
#include "policy/reject.c"
