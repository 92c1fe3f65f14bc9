// Dark or light: as the system has it, unless the reader chose.

export type Theme = "system" | "light" | "dark";

const NAME = "understudy.theme";
const watchers = new Set<() => void>();

export function theme(): Theme {
  const kept = localStorage.getItem(NAME);
  return kept === "light" || kept === "dark" ? kept : "system";
}

export function setTheme(next: Theme): void {
  if (next === "system") localStorage.removeItem(NAME);
  else localStorage.setItem(NAME, next);
  applyTheme();
  for (const tell of watchers) tell();
}

export function applyTheme(): void {
  const chosen = theme();
  if (chosen === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
}

/** Calls `tell` when colours change; returns what stops it. Canvases have to be painted anew. */
export function onTheme(tell: () => void): () => void {
  const system = matchMedia("(prefers-color-scheme: dark)");
  watchers.add(tell);
  system.addEventListener("change", tell);
  return () => {
    watchers.delete(tell);
    system.removeEventListener("change", tell);
  };
}

/** The value that a colour of the style sheet has now, for canvases: "--local" -> "rgb(15, 107, 92)". */
export function colour(name: string): string {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}
