"use strict";
// Pages work without this file; it saves clicks.

// A form with class "auto" is sent when a field in it changes.
for (const form of document.querySelectorAll("form.auto")) {
  form.addEventListener("change", () => form.requestSubmit());
}

// An empty field does not go into the address.
for (const form of document.querySelectorAll("form[method=get]")) {
  form.addEventListener("submit", () => {
    for (const field of form.elements) if (field.name && field.value === "") field.disabled = true;
  });
}
window.addEventListener("pageshow", () => {
  for (const field of document.querySelectorAll("form[method=get] :disabled")) field.disabled = false;
});

// Keys: / goes to the search field; left and right go to links with rel=prev and rel=next.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea, [contenteditable]")) return;
  if (event.key === "/") {
    const search = document.querySelector("input[type=search]");
    if (search) { event.preventDefault(); search.focus(); }
    return;
  }
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = rel && document.querySelector(`a[rel=${rel}]`);
  if (link) link.click();
});

// A button with data-zoom shows its image at so many times its pixels.
for (const button of document.querySelectorAll("button[data-zoom]")) {
  button.addEventListener("click", () => {
    const image = document.getElementById(button.dataset.of);
    const zoom = Number(button.dataset.zoom);
    image.width = Number(image.dataset.width) * zoom;
    image.height = Number(image.dataset.height) * zoom;
    for (const other of document.querySelectorAll(`button[data-of="${button.dataset.of}"]`)) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  });
}

// An image that cannot be read is replaced by the server's line about it.
for (const image of document.querySelectorAll("img[data-error]")) {
  const replace = async () => {
    const line = document.createElement("span");
    line.className = "error";
    line.textContent = await fetch(image.dataset.error).then((answer) => answer.text(), () => "the server has ended");
    image.replaceWith(line);
  };
  if (image.complete && image.naturalWidth === 0) replace();
  else image.addEventListener("error", replace);
}
