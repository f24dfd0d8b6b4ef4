(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const button = Object.assign(document.createElement("button"), { className: "theme", type: "button" });
  const name = () => { button.textContent = dark() ? "light" : "dark"; };
  button.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; name(); };
  name();
  document.querySelector("main").prepend(button);

  // A click in the legend brings one method out of the rest in every plot; a second click ends that.
  const keys = [...document.querySelectorAll(".legend button")];
  let chosen = null;
  const focus = (key) => {
    root.classList.toggle("focus", key !== null);
    document.querySelectorAll("svg [data-f]").forEach((e) => e.classList.toggle("on", e.dataset.f === key || e.dataset.f === "reference"));
  };
  for (const key of keys) {
    key.setAttribute("aria-pressed", "false");
    key.onmouseenter = () => focus(key.dataset.f);
    key.onmouseleave = () => focus(chosen);
    key.onclick = () => {
      chosen = chosen === key.dataset.f ? null : key.dataset.f;
      keys.forEach((other) => other.setAttribute("aria-pressed", String(other.dataset.f === chosen)));
      focus(chosen);
    };
  }
})();
