/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The prefilter's maps, without a program: they are filled before anything hangs on a device. */
#include "abi/prefilter.h"
