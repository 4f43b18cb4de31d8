// Gradio 6.31's Textbox tells its listeners of input on key presses alone: text that was deleted, pasted, dropped or
// composed would not reach the server. A key press without a key, after each change, makes up for it.
document.addEventListener("input", (event) => {
  if (event.target.matches('[data-testid="textbox"]')) {
    event.target.dispatchEvent(new KeyboardEvent("keypress", { key: "Unidentified" }));
  }
});
