"""The page: its tabs and settings, and the server that shows it."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError
from peftchat.web.access import Access, ContentPolicy
from peftchat.web.chat_tab import ChatTab
from peftchat.web.compare_tab import CompareTab
from peftchat.web.kept_files import KeptFiles
from peftchat.web.loaded_models import LoadedModels
from peftchat.web.page_state import OpenPages
from peftchat.web.settings_panel import SettingsPanel

if TYPE_CHECKING:
    import gradio

_STYLE = Path(__file__).with_name("page.css")


def check_gradio() -> None:
    """Check that Gradio is installed, without importing it.

    Raises:
        UserError: it is not.
    """
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio, which is not installed", hint="Run `pip install 'peftchat[web]'`.")


@dataclass(frozen=True)
class Page:
    """A page that is being served.

    Attributes:
        url: what to open in a browser.
    """

    url: str
    _blocks: "gradio.Blocks"
    _pages: OpenPages

    def wait(self) -> None:
        """Serve until the process is interrupted."""
        try:
            threading.Event().wait()
        finally:
            self.close()

    def close(self) -> None:
        """Stop all answers and the server."""
        self._pages.close_all()
        self._blocks.close(verbose=False)


def serve_page(models: LoadedModels, kept: KeptFiles, access: Access) -> Page:
    """Show the page to browsers; this returns when it answers.

    Args:
        models: what one chats with.
        kept: where examples, pairs and votes go.
        access: the address, and who may open it.
    """
    # Gradio asks its makers for a newer version and tells them what is used; nothing here asks another machine.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    blocks, pages = build_page(models, kept)
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=access.allowed_hosts),
        Middleware(ContentPolicy),
    ]
    blocks.launch(
        server_name=access.host,
        server_port=access.port,
        auth=None if access.password is None else access.accepts,
        auth_message="Any name, and the password. The name is kept with your votes.",
        share=False,
        quiet=True,
        inbrowser=False,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size="1kb",
        footer_links=[],
        app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None},
        theme=_theme(),
        css=_STYLE.read_text(encoding="utf-8"),
    )
    return Page(access.url, blocks, pages)


def build_page(models: LoadedModels, kept: KeptFiles) -> "tuple[gradio.Blocks, OpenPages]":
    """Return the page and the state of those who open it."""
    import gradio as gr

    pages = OpenPages()
    names = ", ".join(models.names) if len(models.names) < 3 else f"{len(models.names)} models"
    with gr.Blocks(title=f"peftchat: {names}", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f'<h1 class="pc-title">{_escaped(names)}</h1>', padding=False)
        if len(models.names) > 1:
            with gr.Tab("Chat", id="chat-tab"):
                chat = ChatTab(models, pages, kept)
            with gr.Tab("Compare blindly", id="compare-tab"):
                compare = CompareTab(models, pages, kept)
        else:
            chat, compare = ChatTab(models, pages, kept), None
        settings = SettingsPanel(models.models[models.names[0]].chat)
        chat.connect(settings)
        if compare is not None:
            compare.connect(settings)

        def forget(request: gr.Request) -> None:
            pages.close(request.session_hash)

        blocks.unload(forget)
    blocks.queue(api_open=False)
    return blocks, pages


def _theme() -> Any:
    import gradio as gr

    # Fonts of the machine: the browser asks nobody for them.
    return gr.themes.Default(
        primary_hue=gr.themes.colors.emerald,
        secondary_hue=gr.themes.colors.sky,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def _escaped(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))
