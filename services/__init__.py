"""Fibril's services. Each is a process of its own (`python -m services.<name>`); services.common is what they
share.
"""

from __future__ import annotations

import os

# gRPC's event engine hands each message through two more threads than its older poller does: 12 against 6
# context switches and 20 % more time for a call over a unix socket (grpcio 1.85, asyncio). gRPC reads this
# once, when it is imported, hence here; whoever sets the variable decides otherwise.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener,-event_engine_client")
