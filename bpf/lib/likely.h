/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Keeps the common case in one straight line of code. */
#pragma once

#ifndef likely
#define likely(condition) __builtin_expect(!!(condition), 1)
#endif

#ifndef unlikely
#define unlikely(condition) __builtin_expect(!!(condition), 0)
#endif
