"""A real trained model through the real server: stories260K tells the story that it is known for, alone and in company."""

from __future__ import annotations

import asyncio
from pathlib import Path

from server.runtime.graphs.decoder.build import build_decoder
from server.runtime.repository import Repository
from tests.conftest import StartServer
from tests.runtime.graphs_decoder.stories import OPENING, stories_folder
from understudy.aio import AsyncClient


async def test_it_tells_its_story(tmp_path: Path, start_server: StartServer) -> None:
    source = stories_folder(tmp_path / "stories")
    repository = Repository(tmp_path / "models")
    with repository.staging() as staged:
        built = build_decoder(source, staged, forms=["float32"])
        (staged / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        repository.publish(staged, "stories", built.manifest)
    running = start_server("[generation]\nkv_cache_bytes = 33554432\nmax_sequences = 6", models=repository.root)
    async with AsyncClient(running.address) as client:
        whole = await client.generate_text("", temperature=0.0, max_tokens=100)  # the first token alone: a story out of nothing
        assert whole.text.startswith(OPENING)
        assert whole.summary.usage.input_tokens == 1
        words = OPENING.split(" ")
        prompts = [" ".join(words[:size]) for size in (0, 2, 4, 8, 11)] * 3
        told = await asyncio.gather(*(client.generate(prompt, temperature=0.0, max_tokens=60).text() for prompt in prompts))
        for prompt, text in zip(prompts, told, strict=True):
            assert (prompt + text).startswith(OPENING), prompt
    running.stop()
