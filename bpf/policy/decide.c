/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The whole of what policy does with a packet: for those that begin or end a connection, for connections whose policy has changed since
 * their last packet, and for whatever is unusual.
 *
 * A connection is allowed by the egress policy of the end that opened it and by the ingress policy of the other, as far as they are
 * endpoints of this node. That holds for its packets in both directions, and for as long as the revision noted in its entry is
 * the endpoint's. Otherwise the policy is asked again, about the connection, not about the packet.
 */
#pragma once

#include "abi/ipcache.h"
#include "lib/slot.h"
#include "policy/frag.h"
#include "policy/host.h"
#include "policy/lookup.h"
#include "policy/report.h"
#include "policy/work.h"

enum decision {
	DECIDE_ALLOW,
	DECIDE_NEW,    /* allowed, and the first of its connection */
	DECIDE_DENY,
	DECIDE_REVOKE, /* denied, but was allowed before */
};

/* An error about some packet. */
static __always_inline bool decide_is_error(const struct pkt_ctx *pkt)
{
	if (pkt->flags & PKT_FRAG_LATER)
		return false;
	if (pkt->proto == IPPROTO_ICMP)
		return pkt->icmp_type == 3 || pkt->icmp_type == 11 || pkt->icmp_type == 12;
	return pkt->proto == IPPROTO_ICMPV6 && pkt->icmp_type - 1u < 4;
}

/* The connection's key into work; whether the packet's source is the lower end. */
static __always_inline bool decide_key(struct __sk_buff *skb, const struct pkt_ctx *pkt, struct pol_work *work)
{
	__be16 sport = ct_source_port(pkt), dport = pkt->dport, id = pkt->sport;

	if (ct_is_icmp(pkt->proto)) {
		/* Of later fragments frag_ports knows it. */
		if (!(pkt->flags & PKT_FRAG_LATER) && bpf_skb_load_bytes(skb, pkt->l4_off + 4, &id, sizeof(id)))
			id = 0;
		ct_icmp_ports(pkt->proto, pkt->icmp_type, id, &sport, &dport);
	}
	return ct_make_key(&work->key, ct_source(pkt), &pkt->dst, sport, dport, pkt->proto);
}

/* What the connection is opened to, as policies name it: a port or an ICMP type. */
static __always_inline __u16 decide_port(const struct pkt_ctx *pkt, bool forward)
{
	if (ct_is_icmp(pkt->proto)) {
		if (forward || ct_icmp_kind(pkt->proto, pkt->icmp_type) != CT_ICMP_ANSWER)
			return pkt->icmp_type;
		return pkt->family == 4 ? CT_ICMP4_REQUEST : CT_ICMP6_REQUEST;
	}
	return bpf_ntohs(forward ? pkt->dport : ct_source_port(pkt));
}

/* Asks the endpoint's policy whether it allows the connection that a packet belongs to or begins (forward); into work->cell. */
static __always_inline bool decide_ask(const struct pol_config *config, const struct pkt_ctx *pkt, struct pol_work *work,
				       bool forward)
{
	__u32 peer = work->end == POL_EGRESS ? pkt->dst_identity : pkt->src_identity;
	const struct fib_addr *addr = work->end == POL_EGRESS ? &pkt->dst : ct_source(pkt);
	__u32 direction = ct_policy(work->end, forward);
	const struct pol_policy *policy;

	if (work->through) {
		work->cell = POL_RANGE(0, 0, POL_ALLOW, POL_RULE_NONE);
		return true;
	}
	if (!work->host && direction == POL_INGRESS && peer == IDENTITY_HOST && config->flags & POL_CFG_HOST) {
		work->cell = POL_RANGE(0, 0, POL_ALLOW, POL_RULE_HOST);
		return true;
	}
	policy = lookup_policy(work->policy);
	work->cell = policy ? lookup_verdict(policy, direction, peer, addr, pkt->proto, decide_port(pkt, forward)) : 0;
	return (POL_RANGE_VERDICT(work->cell) & POL_VERDICT) == POL_ALLOW;
}

/* What the packet does to its connection. */
static __always_inline __u32 decide_state(const struct pkt_ctx *pkt, __u32 flags, bool forward)
{
	if (!forward)
		flags |= CT_ANSWERED;
	if (pkt->proto != IPPROTO_TCP || pkt->flags & PKT_FRAG_LATER)
		return flags;
	if (pkt->tcp_flags & TCP_FIN)
		flags |= forward ? CT_CLIENT_FIN : CT_SERVER_FIN;
	if (pkt->tcp_flags & TCP_RST)
		flags |= CT_RESET;
	return flags;
}

static __always_inline void decide_put(struct pol_work *work, bool established)
{
	void *table = ct_table();
	long error;

	if (established) {
		error = table ? bpf_map_update_elem_((uintptr_t)table, &work->key, &work->fresh, BPF_ANY) : -1;
		if (!error)
			ct_new.delete(&work->key);
	} else {
		error = ct_new.update(&work->key, &work->fresh);
		if (!error && table)
			bpf_map_delete_elem_((uintptr_t)table, &work->key);
	}
	/* The packet passes: the next one asks again. */
	if (error)
		pol_count(POL_STAT_TABLE);
}

/* Whoever answers, or ends something, begins nothing: the connection is known by what is said next. */
static __always_inline bool decide_is_answer(const struct pkt_ctx *pkt)
{
	if (pkt->proto == IPPROTO_TCP)
		return pkt->tcp_flags & TCP_RST || (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK);
	return ct_is_icmp(pkt->proto) && ct_icmp_kind(pkt->proto, pkt->icmp_type) == CT_ICMP_ANSWER;
}

/* A connection begins with this packet, if the policy at this end allows it. */
static __always_inline enum decision decide_begin(const struct pol_config *config, const struct pkt_ctx *pkt, struct pol_work *work,
						  bool low, __u32 now)
{
	struct ct_entry *fresh = &work->fresh;

	if (!decide_ask(config, pkt, work, true))
		return DECIDE_DENY;
	if (decide_is_answer(pkt))
		return DECIDE_ALLOW;
	__builtin_memset(fresh, 0, sizeof(*fresh));
	if (work->end == POL_INGRESS) {
		fresh->revision[POL_INGRESS] = work->revision;
		fresh->rule[POL_INGRESS] = POL_RANGE_RULE(work->cell);
	} else {
		fresh->revision[POL_EGRESS] = work->revision;
		fresh->rule[POL_EGRESS] = POL_RANGE_RULE(work->cell);
	}
	fresh->client = pkt->src_identity;
	fresh->server = pkt->dst_identity;
	fresh->seen = now;
	fresh->flags = decide_state(pkt, (low ? CT_CLIENT_LOW : 0) | CT_ALLOWED << work->end, true);
	if (work->through)
		fresh->flags |= CT_PASSES;
	decide_put(work, false);
	return DECIDE_NEW;
}

static __always_inline void decide_tell_end(const struct pol_config *config, const struct pkt_ctx *pkt, const struct pol_work *work,
					    struct ct_entry *entry)
{
	__u32 flags = entry->flags, both = CT_CLIENT_FIN | CT_SERVER_FIN;

	if (pkt->proto != IPPROTO_TCP || flags & CT_TOLD_CLOSED)
		return;
	if (!(flags & CT_RESET) && (flags & both) != both)
		return;
	entry->flags = flags | CT_TOLD_CLOSED;
	if (config->flags & POL_CFG_FLOWS)
		report(pkt, work, POL_EVENT_CLOSED, POL_EVENT_FORWARDED, REASON_NONE, 0);
}

/* A packet of a connection whose entry is alive. `fresh`: it is not established yet. */
static __always_inline enum decision decide_go_on(const struct pol_config *config, const struct pkt_ctx *pkt, struct pol_work *work,
						  struct ct_entry *entry, bool low, bool fresh, __u32 now)
{
	bool forward = ct_is_forward(entry, low), same = ct_same_identities(entry, pkt, forward);
	__u32 direction = ct_policy(work->end, forward) & 1, state;
	enum decision decision = DECIDE_ALLOW;

	if (work->host && (work->through || entry->flags & CT_PASSES)) {
		work->cell = POL_RANGE(0, 0, POL_ALLOW, POL_RULE_NONE);
	} else if (entry->revision[direction] != work->revision || !same) {
		__u32 allowed = entry->flags & CT_ALLOWED << direction;

		if (!decide_ask(config, pkt, work, forward)) {
			/* What never came through does not keep anybody from beginning the same in the other direction. What did
			 * come through is over now, and must not go on as if its answers had begun it. */
			if (!allowed)
				return forward ? DECIDE_DENY : decide_begin(config, pkt, work, low, now);
			if (!(POL_RANGE_VERDICT(work->cell) & POL_KEEP) || !(entry->flags & CT_ANSWERED))
				return DECIDE_REVOKE;
		} else if (!allowed) {
			decision = DECIDE_NEW;
		}
		if (forward && !same) {
			/* The other end's policy must be asked about these, too. */
			entry->revision[!direction] = 0;
			entry->client = pkt->src_identity;
			entry->server = pkt->dst_identity;
			same = true;
		}
		if (same) {
			entry->revision[direction] = work->revision;
			entry->rule[direction] = POL_RANGE_RULE(work->cell);
			entry->flags |= CT_ALLOWED << direction;
		}
	} else {
		work->cell = POL_RANGE(0, 0, POL_ALLOW, entry->rule[direction]);
	}
	state = decide_state(pkt, entry->flags, forward);
	if (state != entry->flags)
		entry->flags = state;
	if (entry->seen != now)
		entry->seen = now;
	decide_tell_end(config, pkt, work, entry);
	/* Both have spoken, and the one who began has heard it. Who answers with a reset has not begun it: a flood is answered so. */
	if (fresh && forward && (state & (CT_ANSWERED | CT_RESET)) == CT_ANSWERED) {
		work->fresh = *entry;
		decide_put(work, true);
		pol_count(POL_STAT_ESTABLISHED);
	}
	return decision;
}

/* Whether the packet begins a connection although there is one of its ports: of one that is over, or, where it goes to whoever opened
 * that, because answers do not begin anything; but both ends of one that is not established yet may. Who opened it may have gone
 * without a word, and somebody else have its address. */
static __always_inline bool decide_is_another(const struct pkt_ctx *pkt, const struct ct_entry *entry, bool forward, bool fresh)
{
	if (pkt->proto == IPPROTO_TCP && (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return entry->flags & CT_CLOSED || (!forward && !fresh);
	return !forward && ct_is_icmp(pkt->proto) && ct_icmp_kind(pkt->proto, pkt->icmp_type) == CT_ICMP_REQUEST;
}

static __always_inline enum decision decide(struct __sk_buff *skb, const struct pol_config *config, const struct pkt_ctx *pkt,
					    struct pol_work *work, __u32 now)
{
	bool low = decide_key(skb, pkt, work), fresh = false;
	struct ct_entry *entry = ct_established(&work->key);

	if (!entry) {
		entry = ct_new.lookup(&work->key);
		fresh = true;
	}
	if (!entry || !ct_alive(config, entry, pkt->proto, now))
		return decide_begin(config, pkt, work, low, now);
	if (decide_is_another(pkt, entry, ct_is_forward(entry, low), fresh))
		return decide_begin(config, pkt, work, low, now);
	return decide_go_on(config, pkt, work, entry, low, fresh, now);
}

/* The host is the packet's other end, and has a policy that has not been asked yet. */
static __always_inline bool decide_host_next(const struct pkt_ctx *pkt, const struct pol_work *work)
{
	if (work->host || (work->end == POL_EGRESS ? pkt->dst_identity : pkt->src_identity) != IDENTITY_HOST)
		return false;
	return pkt->direction == (work->end == POL_EGRESS ? DIR_FROM_POD : DIR_TO_POD) && ct_host();
}

/* No policy has anything against it. */
static __always_inline int decide_let(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct pol_work *work)
{
	if (work->host == POL_HOST_UPLINK)
		return TC_ACT_UNSPEC;
	if (work->host == POL_HOST_OVERLAY) {
		pol_tails.call(skb, POL_TAIL_OVERLAY);
		return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
	}
	/* Beside a pod the host is the other end. */
	return work->end == (work->host ? POL_INGRESS : POL_EGRESS) ? slot_after_policy_egress(skb, pkt)
								    : slot_after_policy_ingress(skb, pkt);
}

/* The policy that was asked has nothing against it. */
static __always_inline int decide_pass(struct __sk_buff *skb, struct pkt_ctx *pkt, struct pol_work *work)
{
	if (unlikely(decide_host_next(pkt, work))) {
		work->host = POL_HOST_BESIDE;
		work->end = !work->end;
		work->unrelated = 0;
		pol_tails.call(skb, POL_TAIL_DECIDE);
		return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
	}
	return decide_let(skb, pkt, work);
}

/* What fib_policy_reject has made, and cannot be asked about: it is no packet of a connection that was allowed. */
static __always_inline bool decide_is_refusal(const struct pkt_ctx *pkt)
{
	return (pkt->proto == IPPROTO_TCP && pkt->tcp_flags & TCP_RST) || decide_is_error(pkt);
}

static __always_inline int decide_pass_refusal(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct pol_work *work)
{
	/* There may be another pod's policy to come. */
	if (work->end == POL_INGRESS || !pkt->dst_id)
		skb->mark = 0;
	return decide_let(skb, pkt, work);
}

/* Nobody asks whether a pod may speak to itself. */
static __always_inline bool decide_is_self(const struct pkt_ctx *pkt)
{
	return pkt->src_id && pkt->src_id == pkt->dst_id;
}

static __always_inline __u32 decide_reason(const struct pol_work *work, enum decision decision)
{
	__u8 verdict = POL_RANGE_VERDICT(work->cell) & POL_VERDICT;

	if (decision == DECIDE_REVOKE)
		return REASON_POLICY_REVOKED;
	if (verdict == POL_DENY)
		return REASON_POLICY_DENIED;
	return verdict == POL_DEFAULT ? REASON_POLICY_DEFAULT : REASON_POLICY_BROKEN;
}

static __always_inline int decide_deny(struct __sk_buff *skb, const struct pol_config *config, struct pkt_ctx *pkt,
				       struct pol_work *work, const struct pol_ep *ep, enum decision decision, __u32 reason, __u32 now)
{
	bool audit = config->flags & POL_CFG_AUDIT || (ep && ep->flags & POL_EP_AUDIT);
	__u8 type = decision == DECIDE_REVOKE ? POL_EVENT_REVOKED : POL_EVENT_DROP;

	if (audit && reason != REASON_POLICY_LOCKDOWN) {
		pol_count(POL_STAT_AUDITED);
		report_refusal(pkt, work, now, type, POL_EVENT_AUDITED, reason);
		return decide_pass(skb, pkt, work);
	}
	pol_count(decision == DECIDE_REVOKE ? POL_STAT_REVOKED : POL_STAT_DENIED);
	report_refusal(pkt, work, now, type, POL_EVENT_DROPPED, reason);
	if (POL_RANGE_VERDICT(work->cell) & POL_REJECT) {
		work->reason = reason;
		pol_tails.call(skb, POL_TAIL_REJECT);
	}
	return verdict_drop(skb, pkt, reason);
}

/* The policy in force and its revision, by one look: between two, user space might put another one there, and what the old one
 * allowed would be noted as allowed by the new one. */
static __always_inline void decide_policy(struct pol_work *work, const struct pol_ep *ep)
{
	__u64 both = ep ? *(const volatile __u64 *)ep : 0;

	work->policy = both;
	work->revision = both >> 32;
}

int fib_policy_decide(struct __sk_buff *skb)
{
	struct pol_config *config = pol_configuration();
	struct pkt_ctx *pkt = slot_packet();
	struct pol_work *work = pol_work();
	enum decision decision;
	struct pol_ep *ep;
	__u32 id, owner, now;
	bool mine;

	if (!pkt || !work || !config)
		return TC_ACT_SHOT;
	if (unlikely(skb->mark == POL_MARK && decide_is_refusal(pkt)))
		return decide_pass_refusal(skb, pkt, work);
	id = work->end == POL_EGRESS ? pkt->src_id : pkt->dst_id;
	owner = skb->ifindex;
	/* The compiler would choose between two addresses, one of which the verifier wants to see as it is. */
	asm volatile("" : "+r"(owner));
	if (work->end != POL_EGRESS)
		owner = pkt->dst_ifindex;
	if (work->host)
		id = owner = 0;
	now = pol_beat(config);
	pol_count(POL_STAT_CHECKED);
	work->cell = 0;
	ep = pol_eps.lookup(&id);
	/* Before its policy, which is cleared before the owner changes. */
	mine = ep && *(const volatile __u32 *)&ep->owner == owner;
	decide_policy(work, ep);
	if (work->host && (host_is_reserved(skb, config, pkt, work) || !work->policy))
		return decide_pass(skb, pkt, work);
	if (!mine || !work->policy)
		return decide_deny(skb, config, pkt, work, 0, DECIDE_DENY, REASON_POLICY_UNKNOWN, now);
	if (ep->flags & POL_EP_LOCKDOWN && !work->through)
		return decide_deny(skb, config, pkt, work, ep, DECIDE_DENY, REASON_POLICY_LOCKDOWN, now);
	if (decide_is_self(pkt))
		return decide_pass(skb, pkt, work);
	if (!work->unrelated && decide_is_error(pkt))
		pol_tails.call(skb, POL_TAIL_RELATED);
	if (!frag_ports(skb, pkt))
		return decide_deny(skb, config, pkt, work, ep, DECIDE_DENY, REASON_POLICY_FRAGMENT, now);
	decision = decide(skb, config, pkt, work, now);
	if (decision == DECIDE_NEW) {
		pol_count(POL_STAT_NEW);
		if (config->flags & POL_CFG_FLOWS)
			report(pkt, work, POL_EVENT_NEW, POL_EVENT_FORWARDED, REASON_NONE, 0);
	}
	if (decision <= DECIDE_NEW)
		return decide_pass(skb, pkt, work);
	if (work->host && decision == DECIDE_DENY && host_may_be_older(pkt, work))
		pol_tails.call(skb, POL_TAIL_OLDER);
	return decide_deny(skb, config, pkt, work, ep, decision, decide_reason(work, decision), now);
}
