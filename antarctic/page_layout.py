"""The page by Gradio: what stands where, and which function answers to what."""

import socket

import gradio as gr

from antarctic import page
from antarctic.errors import InputError
from antarctic.gallery_page import VEIL
from antarctic.uploads import MOST_IMAGES
from antarctic.visitors import BOUNDS

# Wide windows have the words below the image and the result beside both. In narrow ones the result
# follows the image.
CSS = page.CSS + """
#ac-grid { display: grid; grid-template-columns: minmax(300px, 5fr) minmax(0, 8fr); gap: 16px;
  grid-template-areas: "photo result" "words result"; grid-template-rows: auto 1fr }
#ac-grid > * { min-width: 0 !important }
#ac-photo { grid-area: photo } #ac-result { grid-area: result } #ac-words { grid-area: words }
@media (max-width: 760px) { #ac-grid { grid-template-columns: minmax(0, 1fr);
  grid-template-areas: "photo" "result" "words" } }
/* One row, so that the caption is in sight while one types below. */
#examples .gallery { flex-wrap: nowrap; overflow-x: auto; padding-bottom: 6px }
#examples .gallery > * { flex: none }
#gallery .caption-label { white-space: normal; max-width: calc(100% - 8px) }
@media (max-width: 760px) {
  #gallery .grid-container { grid-template-columns: 1fr 1fr !important } }
progress { width: 100%; accent-color: #2e9463 }
"""
# A pause in typing lays the words over: the button stands for whoever does without scripts' timing.
TYPING = """<script>
let pause;
addEventListener("input", event => {
  if (!event.target.closest(".ac-box")) return;
  clearTimeout(pause);
  pause = setTimeout(() => document.querySelector("#use-words")?.click(), 500);
});
</script>"""
# Pointing at an entry, or at a word of the caption that one spells, darkens the image where the map
# has no share. So does moving to an entry by Tab.
POINTING = "<script>" + VEIL + """
let lit = [], veil;
const light = event => {
  const source = event.target.closest("[data-map], [data-of]");
  const side = source?.closest("[data-box]"), image = document.querySelector("#photo img");
  lit.forEach(part => part.classList.remove("ac-lit"));
  lit = [];
  veil?.remove();
  const entry = source?.dataset.of ? side.querySelectorAll(".ac-bars li")[source.dataset.of]
    : source;
  if (!entry?.dataset.map || !image?.naturalWidth) return;
  lit = [entry, source];
  lit.forEach(part => part.classList.add("ac-lit"));
  veil = veilOver(image, side, entry);
  veil.className = "ac-veil";
  for (const [name, size] of [["left", image.offsetLeft], ["top", image.offsetTop],
                              ["width", image.offsetWidth], ["height", image.offsetHeight]])
    veil.style[name] = size + "px";
};
addEventListener("pointerover", light);
addEventListener("focusin", light);
</script>"""
DEVICE = {"concurrency_id": "device", "concurrency_limit": 1}
PRIVATE = {"api_visibility": "private"}


def uploads_only(component):
    """Makes a component take the paths of uploads as they are, and nothing else. Gradio's own way
    would decode images, without our bounds, and fetch an address that a request names."""
    move = component.async_move_resource_to_block_cache

    async def local(path):
        if path is not None and "://" in str(path):
            raise gr.Error("images must be uploaded", print_exception=False)
        return await move(path)

    def paths(payload):
        files = getattr(payload, "root", payload)
        if isinstance(files, list):
            return [path_of(file) for file in files]
        return None if files is None else path_of(files)

    component.async_move_resource_to_block_cache, component.preprocess = local, paths
    return component


def path_of(file):
    """The path of an upload, a FileData of Gradio's."""
    if not file.path or (file.url or "").startswith("data:"):
        raise gr.Error("images must be uploaded", print_exception=False)
    return file.path


class Page:
    """The page. answers: an Answers. examples: paths of images to click on."""

    def __init__(self, answers, examples):
        self.answers, self.examples = answers, examples

    def build(self, title):
        """The gr.Blocks."""
        with gr.Blocks(title=title, analytics_enabled=False) as blocks:
            gr.HTML(page.WELCOME, padding=False)
            with gr.Tab("Caption"):
                settings = self.caption_tab()
            with gr.Tab("Many images"):
                self.many_tab(settings[1:])
            with gr.Tab("About"):
                gr.HTML(page.HELP)
            self.add_api([*settings[:4], *settings[5:]])
            blocks.unload(self.answers.leave)
        return blocks

    def caption_tab(self):
        """Returns the components of photo, words, only, ban, own names and the dials."""
        with gr.Row(elem_id="ac-grid"):
            with gr.Column(elem_id="ac-photo"):
                photo = uploads_only(gr.Image(
                    type="filepath", label="Image", height=250, elem_id="photo", buttons=[],
                    sources=["upload", "clipboard", "webcam"]))
                if self.examples:
                    gr.Examples([[path] for path in self.examples], [photo], label="Examples",
                                examples_per_page=12, elem_id="examples", api_visibility="private",
                                cache_examples=False)
            with gr.Column(elem_id="ac-result"):
                result = gr.HTML(page.WAITING, elem_id="result", padding=False, min_height=180)
                with gr.Row():
                    if self.answers.story:
                        tell = gr.Button("Tell a story", elem_id="tell", size="sm")
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                if self.answers.story:
                    story = gr.HTML(elem_id="story", padding=False)
                with gr.Accordion("Search in the vocabulary", open=False):
                    text = gr.Textbox("", label="Why is a word in the table, or not?",
                                      max_length=200, placeholder="penguin", elem_id="search")
                    find = gr.Button("Search", elem_id="find", size="sm")
                    found = gr.HTML(elem_id="found", padding=False)
            with gr.Column(elem_id="ac-words"):
                own_names = gr.State(())
                words, only, ban, use = self.word_boxes(own_names)
                self.name_boxes(own_names)
                dials = self.dials()
        settings = [photo, words, only, ban, own_names, *dials]
        changes = [photo.change, use.click, own_names.change, *(dial.change for dial in dials)]
        running = [gr.on(changes, self.answers.show, settings, result, show_progress="minimal",
                         trigger_mode="always_last", **DEVICE, **PRIVATE)]
        photo.upload(self.answers.preview, photo, photo, show_progress="hidden", **DEVICE,
                     **PRIVATE)
        if self.answers.story:
            running.append(tell.click(self.answers.tell, settings, story, **DEVICE, **PRIVATE))
        gr.on([find.click, text.submit], self.answers.look_up,
              [text, photo, words, only, ban, own_names, dials[0]], found, **DEVICE, **PRIVATE)
        stop.click(self.answers.leave, cancels=running, queue=False, **PRIVATE)
        return settings

    def word_boxes(self, own_names):
        with gr.Accordion("Your words", open=True):
            words = gr.Textbox("", label="Add, a word or phrase a line", lines=3, max_lines=12,
                               placeholder="penguin\npenguins", max_length=20_000,
                               elem_id="own-words", elem_classes="ac-box",
                               info="They count at once, for you alone. Nothing is trained.")
            ban = gr.Textbox("", label="Ban, a word a line", lines=2, max_lines=8,
                             max_length=20_000, elem_id="ban-words", elem_classes="ac-box",
                             info="No entry and no caption holds them, as whole words.")
            only = gr.Textbox("", label="Only these, a word or phrase a line", lines=2,
                              max_lines=12, max_length=20_000, elem_id="only-words",
                              elem_classes="ac-box", info="The vocabulary is these lines alone.")
            with gr.Row():
                use = gr.Button("Caption again", variant="primary", elem_id="use-words", size="sm")
                save = gr.Button("Save", elem_id="save", size="sm")
            saved = gr.HTML(elem_id="saved", padding=False)
        save.click(self.answers.save, [words, only, ban, own_names], saved, **DEVICE, **PRIVATE)
        return words, only, ban, use

    def name_boxes(self, own_names):
        """Names from photos. own_names: their gr.State."""
        with gr.Accordion("A name from photos", open=False, elem_id="teaching"):
            photos = uploads_only(gr.File(
                file_count="multiple", elem_id="teach-photos", height=140,
                label="Three to five photos of it"))
            with gr.Row():
                name = gr.Textbox("", label="Name", placeholder="Tom", max_length=100,
                                  elem_id="teach-name")
                phrase = gr.Textbox("", label="A word for it, with its article", max_length=100,
                                    placeholder="a cat", elem_id="teach-phrase")
            with gr.Row():
                teach = gr.Button("Teach", variant="primary", elem_id="teach", size="sm")
                forget = gr.Button("Forget", elem_id="forget", size="sm")
            learned = gr.HTML(elem_id="taught", padding=False)
        gr.on([teach.click, phrase.submit], self.answers.teach, [own_names, photos, name, phrase],
              [own_names, learned], **DEVICE, **PRIVATE)
        # In one queue with teaching, so that what is forgotten meanwhile does not come back.
        forget.click(self.answers.forget, [own_names, name], [own_names, learned], **DEVICE,
                     **PRIVATE)

    def dials(self):
        """The components of answers.DIALS."""
        start = self.answers.studio.dials

        def slider(name, label, step, info=None, high=None):
            low, most = BOUNDS[name]
            return gr.Slider(low, high or most, start[name], step=step, label=label, info=info,
                             elem_id=f"dial-{name}")

        with gr.Accordion("Dials", open=False):
            return [
                slider("topk", "Entries of the table", 1, "BART writes from so many entries."),
                gr.Checkbox(start["do_sample"], label="Sample captions, not beam search",
                            elem_id="dial-do_sample"),
                slider("num_beams", "Beams", 1, "Beam search keeps so many beginnings."),
                slider("num_return_sequences", "Candidates", 1,
                       "Beam search gives at most as many as it has beams."),
                slider("temperature", "Temperature", 0.05, "Of samples: higher is more varied."),
                slider("top_p", "Top p", 0.01, "Of samples: the share of likely words."),
                slider("lm_weight", "Weight of BART's score", 0.05,
                       "In the choice, beside CLIP's score."),
                gr.Number(start["seed"], label="Seed", precision=0, elem_id="dial-seed",
                          info="Another number gives other samples.")]

    def many_tab(self, settings):
        gr.HTML('<p class="ac-small">Your words and dials of the first tab count here, too.</p>')
        files = uploads_only(gr.File(file_count="multiple", elem_id="files",
                                     label=f"Images, up to {MOST_IMAGES}"))
        with gr.Row():
            folder = uploads_only(gr.UploadButton("Choose a folder", file_count="directory",
                                                  elem_id="folder"))
            start = gr.Button("Caption all", variant="primary", elem_id="many")
            stop = gr.Button("Stop", elem_id="stop-many")
        state = gr.HTML(elem_id="state", padding=False)
        gallery = gr.Gallery(label="Captions", columns=4, height="auto", object_fit="contain",
                             elem_id="gallery", interactive=False, buttons=["fullscreen"])
        downloads = gr.File(label="Downloads", file_count="multiple", interactive=False,
                            elem_id="downloads")
        folder.upload(lambda paths: paths, folder, files, **PRIVATE)
        # Another queue than that of the first tab: their captions come in turns.
        running = start.click(self.answers.many, [files, *settings], [state, gallery, downloads],
                              show_progress="minimal", concurrency_id="many", concurrency_limit=1,
                              **PRIVATE)
        stop.click(self.answers.leave, cancels=[running], queue=False, **PRIVATE)

    def add_api(self, settings):
        photo, words, only, ban, *_ = settings
        text, record = gr.Textbox(visible=False), gr.JSON(visible=False)
        button = gr.Button(visible=False)
        button.click(self.answers.api_caption, settings, record, api_name="caption", **DEVICE)
        button.click(self.answers.api_search, [text, photo, words, only, ban], record,
                     api_name="search", **DEVICE)
        if self.answers.story:
            button.click(self.answers.api_story, text, text, api_name="story", **DEVICE)


def launch(page_of, host, port, local, auth=None, max_mb=64, queue=256):
    """Starts a Page's server: (the gr.Blocks, its address). Nothing is fetched from elsewhere, and
    no file is served but uploads and results. Raises InputError where the address cannot be used.

    port: 0 takes any. local: whether host is this machine alone. auth: "user:password", or None.
    max_mb: of an upload. queue: requests that wait at most.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A page of another site must not reach this one under a name of its own.
    hosts = ["127.0.0.1", "localhost", "[::1]", "[", "testserver"] if local else ["*"]
    blocks = page_of.build("antarctic-captions")
    blocks.queue(max_size=queue, api_open=False)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"],
                              font_mono=["ui-monospace", "monospace"], primary_hue="emerald",
                              secondary_hue="slate", neutral_hue="slate")
    page_of.answers.folder.keep()
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port or free_port(host), share=False, quiet=True,
            auth=tuple(auth.split(":", 1)) if auth else None, prevent_thread_lock=True,
            inbrowser=False, footer_links=[], run_history=False, allowed_paths=[],
            max_file_size=max_mb << 20, enable_monitoring=False, ssr_mode=False, pwa=False,
            mcp_server=False, theme=theme, css=CSS, head=TYPING + POINTING, show_error=False,
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]})
    except OSError as error:
        raise InputError(f"the page cannot listen on {host}, port {port}; give another --port or "
                         f"--host") from error
    page_of.answers.folder.keep()
    return blocks, address


def free_port(host):
    with socket.socket() as free:
        free.bind((host, 0))
        return free.getsockname()[1]
