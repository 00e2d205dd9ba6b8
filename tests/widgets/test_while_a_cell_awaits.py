"""What a page says to a real kernel while a cell awaits is confirmed: till then it holds back its next change."""

from jupyter_client.manager import start_new_kernel

MAKE = """import asyncio, ipywidgets
from rwkv_nb.widgets.common import confirm_changes
confirm_changes()
number, seen = ipywidgets.IntText(), []
number.observe(lambda change: seen.append(change.new), "value")
print(number.comm.comm_id, end="")"""
WAIT = """while len(seen) < 2:
    await asyncio.sleep(0.01)
print(seen)"""


def test_each_change_is_confirmed_and_the_cell_goes_on():
    manager, client = start_new_kernel()

    def told(until):
        """Messages up to one that is the last."""
        messages = []
        while not (messages and until(messages[-1])):
            messages.append(client.get_iopub_msg(timeout=60))
        return messages

    def idle(asked):
        return lambda m: m["content"].get("execution_state") == "idle" and m["parent_header"].get("msg_id") == asked

    def text(messages):
        return "".join(m["content"].get("text", "") for m in messages)

    try:
        number = text(told(idle(client.execute(MAKE))))
        cell = client.execute(WAIT)
        told(lambda m: m["msg_type"] == "execute_input")
        for value in (1, 2):
            change = client.session.msg("comm_msg", {"comm_id": number, "data": {
                "method": "update", "state": {"value": value}, "buffer_paths": []}})
            client.shell_channel.send(change)
            told(idle(change["header"]["msg_id"]))
        assert "[1, 2]" in text(told(idle(cell)))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
