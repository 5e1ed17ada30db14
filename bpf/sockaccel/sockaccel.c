/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* TCP connections whose two ends are on this machine: what one sends is put straight into the other's receive queue.
 *
 * fib_sa_ops   sock_ops: pairs are made where connections begin, and end
 * fib_sa_msg   sk_msg: each send() of a socket of a pair, with the socket's lock held
 * fib_sa_recv, fib_sa_reading  tracepoints behind and within recv(): reads that the short way does not know end it
 * fib_sa_ulp   setsockopt(): a protocol on top of a socket ends the pair
 * fib_sa_waits  asked by user space whether anything is unread
 *
 * Everything begins on TCP and passes all hooks there. A pair is handed over once its two ends have taken turns several times, at a moment
 * when the reader has read all that came over TCP; so nothing can be overtaken. To go back to TCP is safe at any time: what
 * was handed over is read first. Each change of a policy that concerns an end, and of the service's own configuration, sends the
 * pair back to TCP, where it proves itself again by getting through.
 *
 * A pair that turns to bulk is taken out of sa_socks, as soon as nothing that was handed over can be unread: taking a socket out throws
 * that away. Then it costs nothing any more.
 */
#include <uapi/linux/in.h>

#include "abi/endpoint.h"
#include "abi/policy_eps.h"
#include "abi/sockaccel.h"
#include "sockaccel/kernel.h"
#include "sockaccel/pair.h"
#include "sockaccel/calls.h"
#include "sockaccel/msg.h"
#include "sockaccel/ops.h"
#include "sockaccel/ask.h"
#include "sockaccel/ulp.h"
