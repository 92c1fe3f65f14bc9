"""Our file of the Open Inference Protocol means the same on the wire as the one inside the real client."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

# Two files that define the package `inference` cannot live in one process: each is described by a process of its own.
DESCRIBE = """
import importlib, json, sys
from google.protobuf.descriptor_pb2 import FileDescriptorProto
messages, enums, methods = {}, {}, {}
def enum(e, path):
    enums[path + e.name] = {v.name: v.number for v in e.value}
def walk(m, path):
    name = path + m.name
    oneofs = [o.name for o in m.oneof_decl]
    messages[name] = {
        f.name: [f.number, f.type, f.label, f.type_name, oneofs[f.oneof_index] if f.HasField("oneof_index") else ""] for f in m.field
    }
    for nested in m.nested_type:
        walk(nested, name + ".")
    for e in m.enum_type:
        enum(e, name + ".")
for module in sys.argv[1:]:
    file = FileDescriptorProto()
    importlib.import_module(module).DESCRIPTOR.CopyToProto(file)
    assert file.package == "inference"
    for m in file.message_type:
        walk(m, "")
    for e in file.enum_type:
        enum(e, "")
    for s in file.service:
        for r in s.method:
            methods[s.name + "/" + r.name] = [r.input_type, r.output_type, r.client_streaming, r.server_streaming]
print(json.dumps([messages, enums, methods]))
"""
# Messages of which we write down the part that has a meaning here.
PARTIAL = {"ModelConfig", "ModelInput", "ModelOutput", "ModelInstanceGroup", "ModelDynamicBatching"}


def _described(*modules: str) -> Any:
    done = subprocess.run([sys.executable, "-c", DESCRIBE, *modules], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_every_message_enum_and_method_equals_the_clients() -> None:
    messages, enums, methods = _described("understudy.oip.open_inference_pb2")
    theirs, their_enums, their_methods = _described("tritonclient.grpc.model_config_pb2", "tritonclient.grpc.service_pb2")
    assert methods == their_methods
    assert len(methods) == 20
    assert enums.keys() <= their_enums.keys()
    for name, values in enums.items():
        assert values == their_enums[name], name
    for name, fields in messages.items():
        if name.split(".")[0] in PARTIAL:
            assert {k: theirs[name][k] for k in fields} == fields, name
        else:
            assert fields == theirs[name], name
    for method in their_methods.values():
        assert method[0].rsplit(".", 1)[1] in messages
        assert method[1].rsplit(".", 1)[1] in messages
