"""The service's part that looks into TLS, alone in a process, told what to do by lines of JSON.

    python -m tests.vm.looker INSTANCE PODS

PODS: JSON, name -> (path of network namespace, its cookie).
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from google.protobuf.json_format import MessageToDict

from fibril.tls.v1 import tls_pb2 as pb
from services.common.instance import Instance
from services.sockaccel.plan import Pod
from services.sockaccel.tls import model
from services.sockaccel.tls.looker import Looker


def plain(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


async def kept(looker: Looker) -> list[dict[str, Any]]:
    found = []
    async for message in looker.follow(1024):
        if message is None:
            break
        found.append(plain(message))
    return found


async def main(name: str, pods: dict[str, tuple[str, int]]) -> None:
    targets: list[model.Target] = []
    known = [
        Pod(number, pod, cookie, {}, 0, frozenset(), netns) for number, (pod, (netns, cookie)) in enumerate(pods.items())
    ]
    looker = Looker(Instance.from_env(name), lambda: targets, lambda: known)
    listening = asyncio.create_task(looker.listen())
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        if "target" in order:
            targets[:] = [model.declared(pb.Target(**order["target"]), "target")]
        await looker.agree()
        print(json.dumps({"probes": plain(looker.probes()), "messages": await kept(looker)}), flush=True)
    listening.cancel()
    await looker.stop()


asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
