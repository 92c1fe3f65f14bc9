"""`understudy health`: asks a running server whether it serves; what a container's health check runs."""

from __future__ import annotations

import sys

import grpc


def health(address: str, service: str, timeout_s: float) -> int:
    """Prints the answer of grpc.health.v1. Returns 0 for SERVING, 1 for anything else or no answer."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            print(f"{address}: no answer ({error.code().name}): {error.details()}", file=sys.stderr)
            return 1
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    print(f"{address} {service or 'server'}: {state}")
    return 0 if reply.status == health_pb2.HealthCheckResponse.SERVING else 1
