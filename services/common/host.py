"""Runs services in this process."""

from __future__ import annotations

from services.common.service import ComponentStatus, HostContext, Registrar, Service

__all__ = ["ComponentStatus", "HostContext", "Registrar", "Service"]
