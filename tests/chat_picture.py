"""A picture of the chat for the documentation, taken from a server that runs:

    opdlm serve FOLDER --compare ORIGINAL
    python -m tests.chat_picture http://127.0.0.1:8000 docs/images/chat.png "first question" "second question"

The last answer stands still while it is unmasked, after `--events` events of its stream.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tests.browser import chromium

# the stream of the last question stands still after so many events
_STOPPED = """
const fetched = window.fetch;
window.asked = 0;
window.fetch = async (url, options) => {
  const reply = await fetched(url, options);
  if (!String(url).endsWith("/v1/chat/completions") || ++window.asked < QUESTIONS) return reply;
  let left = EVENTS;
  const slow = new TransformStream({
    async transform(part, out) {
      for (const event of new TextDecoder().decode(part).split(/(?<=\\n\\n)/)) {
        if (left-- <= 0) {
          setTimeout(() => { document.body.dataset.stopped = ""; }, 3000); // the original's answer beside it goes on
          await new Promise(() => {});
        }
        out.enqueue(new TextEncoder().encode(event));
      }
    },
  });
  return new Response(reply.body.pipeThrough(slow), reply);
};
"""


def take(page: Any, url: str, out: Path, questions: list[str], events: int, key: str | None = None) -> None:
    """The picture, of a page that nothing was loaded into yet; `key` is the server's API key."""
    script = _STOPPED.replace("QUESTIONS", str(len(questions))).replace("EVENTS", str(events))
    page.add_init_script(script + (f"sessionStorage.setItem('opdlm-key', '{key}');" if key else ""))
    page.goto(url)
    page.locator("#threshold-value:not(:empty)").wait_for()
    for number, question in enumerate(questions, start=1):
        page.locator("#question").fill(question)
        page.locator("#question").press("Enter")
        if number < len(questions):
            page.locator("#send", has_text="Send").wait_for(timeout=120_000)
    page.locator("body[data-stopped]").wait_for(timeout=120_000)
    page.screenshot(path=out)


def main() -> None:
    parser = argparse.ArgumentParser(description="a picture of the chat")
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--events", type=int, default=24)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--height", type=int, default=620)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    asked = parser.parse_args()
    with chromium() as browser:
        size = {"width": asked.width, "height": asked.height}
        page = browser.new_page(viewport=size, color_scheme=asked.theme)
        take(page, asked.url, asked.out, asked.questions, asked.events)
    print(f"wrote {asked.out}, {asked.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
