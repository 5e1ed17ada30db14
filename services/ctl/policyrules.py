"""Rules of policies as one reads them: a line each, made of the contract's messages as records."""

from __future__ import annotations

from typing import Final

from services.ctl.render import Record, columns, short

_OPERATORS: Final = {
    "in": "{key} in ({values})", "not-in": "{key} notin ({values})", "exists": "{key}", "does-not-exist": "!{key}",
}  # fmt: skip


def selector(record: Record) -> str:
    """As `kubectl` writes them; "*": everybody."""
    found = [f"{key}={value}" if value else key for key, value in sorted(record.get("match_labels", {}).items())]
    found += [
        _OPERATORS[short(each["operator"], "LABEL_OPERATOR_")].format(key=each["key"], values=",".join(each["values"]))
        for each in record.get("match_expressions", [])
    ]
    return ",".join(found) or "*"


def _subject(rule: Record) -> str:
    return ("node " if rule["subject_is_node"] else "") + selector(rule.get("subject", {}))


def _peers(rule: Record) -> str:
    if rule["match_no_peer"]:
        return "nobody"
    return "; ".join(map(_peer, rule["peers"])) or "everybody"


def _peer(record: Record) -> str:
    (kind,) = record
    found = record[kind]
    match kind:
        case "endpoints":
            return selector(found)
        case "entity":
            return short(found, "ENTITY_")
        case "cidr":
            return str(found["cidr"]) + (f" except {','.join(found['except'])}" if found.get("except") else "")
        case "node":
            return f"node {selector(found.get('nodes', {}))}"
    return f"service {found['name']}"


def _port(record: Record) -> str:
    protocol = short(record["protocol"], "PORT_PROTOCOL_").replace("unspecified", "any")
    if record["name"]:
        return f"{protocol}/{record['name']}"
    first, last = record.get("icmp_type", record["first"]), record["last"]
    if not first and "icmp_type" not in record:
        return protocol
    return f"{protocol}/{first}" + (f"-{last}" if last else "")


def _options(rule: Record) -> str:
    named = {"default_deny": "default-deny", "reject": "reject", "keep_established": "keep-established"}
    return ",".join(text for field, text in named.items() if rule[field])


def _tier(rule: Record) -> str:
    tier = short(rule["tier"], "TIER_")
    return f"{tier} {rule['priority']}" if tier != "normal" else tier


RULES: Final = columns(
    "name",
    ("DIRECTION", lambda r: short(r["direction"], "TRAFFIC_DIRECTION_")),
    ("ACTION", lambda r: short(r["action"], "RULE_ACTION_")),
    ("TIER", _tier),
    ("OF", _subject),
    ("PEERS", _peers),
    ("PORTS", lambda r: ", ".join(map(_port, r["ports"])) or "all"),
    ("OPTIONS", _options),
)
