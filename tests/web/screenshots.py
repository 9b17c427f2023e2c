"""Screenshots of the page for the README, from a real run: `python -m tests.web.screenshots`.

Five instances run the ten jobs with their schedules and the minimum duration of two minutes for
half an hour; one is killed and restarted, balances change. Needs chromium, takes 35 minutes.
"""

import asyncio
import random
import signal
import sys
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import Any, Final

import httpx
from PIL import Image
from playwright.async_api import Browser

from tests.processes import Instance, http_client
from tests.system.databases import own_postgres
from tests.web.browser import chromium, live, tab

FOLDER: Final = Path(__file__).parents[2] / "docs" / "screenshots"
MOST_BYTES: Final = 150_000
SECONDS: Final = 1860
KILL_AT: Final = 900


async def status(client: httpx.AsyncClient) -> dict[str, Any]:
    """Return the status of all jobs and instances."""
    answer = await client.get("/api/cron/status")
    return dict(answer.json())


async def keep_busy(client: httpx.AsyncClient) -> None:
    """Change balances about forty times a second; some changes are refused, some are transfers."""
    users = [1]
    for opening in (500, 2_000, 12_000):
        answer = await client.post("/api/users", json={"balance": opening})
        users.append(answer.json()["userId"])
    while True:
        amount = random.choice([-40, -12, -5, -2, 1, 3, 25])
        await client.post("/api/balance", json={"userId": random.choice(users), "amount": amount})
        if random.random() < 0.1:
            await client.post("/api/balance", json={"userId": 2, "amount": -10_000})
            await transfer_and_hold(client, *random.sample(users, 2))
        await asyncio.sleep(0.02)


async def transfer_and_hold(client: httpx.AsyncClient, payer: int, payee: int) -> None:
    """Make a transfer, which is sometimes reversed, and a hold, which is captured or stays."""
    rent = {"fromUserId": payer, "toUserId": payee, "amount": random.randrange(5, 40)}
    made = await client.post("/api/transfers", json={**rent, "reference": "rent 2026-11"})
    if made.status_code == 200 and random.random() < 0.2:
        entry = made.json()["from"]["version"]
        note = {"note": "the wrong customer"}
        await client.post(f"/api/users/{payer}/entries/{entry}/reverse", json=note)
    order = {"userId": payer, "amount": random.randrange(5, 40), "expiresInSeconds": 7200}
    hold = await client.post("/api/holds", json={**order, "reference": "order 4711"})
    if hold.status_code == 201 and random.random() < 0.9:
        await client.post(f"/api/holds/{hold.json()['id']}/capture")


async def run_for_a_while(instances: list[Instance], client: httpx.AsyncClient) -> None:
    """Make half an hour of history, with a loss in it."""
    began = monotonic()
    await asyncio.sleep(KILL_AT)
    await kill_a_busy_one(instances, client)
    for instance in instances:
        assert instance.process is not None
        if instance.process.returncode is not None:
            await instance.launch()
    await asyncio.sleep(began + SECONDS - monotonic())


async def kill_a_busy_one(instances: list[Instance], client: httpx.AsyncClient) -> None:
    """Kill an instance that runs a job, not the one behind `client`; wait until it is lost."""
    busy: set[str] = set()
    while not busy:
        await asyncio.sleep(0.1)
        seen = (await status(client))["instances"]
        busy = {instance["server"] for instance in seen if instance["running"]} - {
            instances[0].name
        }
    (victim,) = (instance for instance in instances if instance.name == max(busy))
    await victim.stop(signal.SIGKILL)
    await asyncio.sleep(10)


async def wait_for_runs(client: httpx.AsyncClient, number: int) -> None:
    """Wait until at least so many jobs run."""
    while (await status(client))["counts"]["running"] < number:  # noqa: ASYNC110 - of others
        await asyncio.sleep(0.5)
    await asyncio.sleep(20)  # a part of the two minutes


async def take(  # noqa: PLR0913 - the options of a screenshot
    browser: Browser,
    instance: Instance,
    name: str,
    *,
    path: str = "/",
    width: int = 1280,
    height: int = 1160,
    **options: Any,  # noqa: ANN401 - a context's
) -> None:
    """Take a screenshot, and refuse one that is too large for a README."""
    size = {"width": width, "height": height}
    async with tab(browser, instance.url, viewport=size, **options) as page:
        if path.startswith("/users"):
            await page.goto(path)
        else:
            await live(page, path)
        await asyncio.sleep(2.2)
        image = Image.open(BytesIO(await page.screenshot()))
    file = FOLDER / f"{name}.png"
    # 256 colours are enough for a page, and make the file a third as large.
    image.convert("RGB").quantize().save(file, optimize=True)
    size_bytes = file.stat().st_size
    print(f"{file.name:<24} {size_bytes / 1000:>6.1f} kB")
    if size_bytes > MOST_BYTES:
        sys.exit(f"{file} is too large.")


async def main() -> None:
    """Run the service, and take the screenshots."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    async with own_postgres(max_connections="200") as server, AsyncExitStack() as stack:
        database = server.environment()
        instances = [Instance(database, f"app{number}") for number in range(1, 6)]
        for instance in instances:
            stack.push_async_callback(instance.kill)
            await instance.launch()
        await asyncio.gather(*(instance.ready() for instance in instances))
        client = await stack.enter_async_context(http_client(instances[0].url))
        busy = asyncio.create_task(keep_busy(client))
        stack.callback(busy.cancel)
        await run_for_a_while(instances, client)
        pause = {"by": "ada", "reason": "until the disk is larger"}
        await client.post("/api/cron/jobs/record-sizes/pause", params=pause)
        async with chromium() as browser:
            await wait_for_runs(client, 3)
            await take(browser, instances[0], "overview-light")
            await take(browser, instances[0], "overview-dark", color_scheme="dark")
            await take(browser, instances[0], "phone", width=360, height=780, color_scheme="dark")
            await take(browser, instances[0], "balances", path="/#balances", height=760)
            await take(browser, instances[0], "account", path="/users/1")
            await take(browser, instances[0], "job", path="/jobs/audit-ledger", height=900)
            await wait_for_runs(client, 2)
            await kill_a_busy_one(instances, client)
            await take(browser, instances[0], "after-a-kill")


if __name__ == "__main__":
    asyncio.run(main())
