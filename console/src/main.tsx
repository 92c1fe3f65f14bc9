import { render, type ComponentType } from "preact";
import { useEffect, useState } from "preact/hooks";
import { hasKey } from "./api";
import { KeyDialog } from "./keydialog";
import { Interactions } from "./pages/interactions";
import { Jobs } from "./pages/jobs";
import { Keys } from "./pages/keys";
import { Models } from "./pages/models";
import { Overview } from "./pages/overview";
import { Playground } from "./pages/playground";
import { Providers } from "./pages/providers";
import { Skills } from "./pages/skills";
import { Link, usePlace } from "./router";
import { SessionProvider, roleWord, useSession } from "./session";
import "./style.css";
import { applyTheme, setTheme, theme, type Theme } from "./theme";
import { Empty, Page } from "./ui/basics";

interface Entry {
  page: string;
  name: string;
  view: ComponentType<{ item: string }>;
}

const ENTRIES: readonly Entry[] = [
  { page: "overview", name: "Overview", view: Overview },
  { page: "skills", name: "Skills and rollouts", view: Skills },
  { page: "interactions", name: "Interactions", view: Interactions },
  { page: "jobs", name: "Training jobs", view: Jobs },
  { page: "models", name: "Models and adapters", view: Models },
  { page: "providers", name: "Providers and budgets", view: Providers },
  { page: "playground", name: "Playground", view: Playground },
  { page: "keys", name: "Keys and audit", view: Keys },
];

const THEMES: Record<Theme, { next: Theme; name: string }> = {
  system: { next: "light", name: "System" },
  light: { next: "dark", name: "Light" },
  dark: { next: "system", name: "Dark" },
};

function ThemeButton() {
  const [now, setNow] = useState(theme());
  const change = (): void => {
    const { next } = THEMES[now];
    setTheme(next);
    setNow(next);
  };
  return (
    <button type="button" class="quiet" onClick={change}>
      <span class="sr">Colours: </span>
      {THEMES[now].name}
    </button>
  );
}

function CallerButton({ onOpen }: { onOpen: () => void }) {
  const { caller, locked } = useSession();
  const text = locked ? "Enter key" : caller ? `${caller.keysRequired || hasKey() ? (caller.name ?? "").replace("apiKeys/", "key ") : "no key"} · ${roleWord(caller.role)}` : "Key";
  return (
    <button type="button" class="quiet" onClick={onOpen}>
      <span class="sr">Key of this tab: </span>
      {text}
    </button>
  );
}

function Shell() {
  const place = usePlace();
  const session = useSession();
  const [keyOpen, setKeyOpen] = useState(false);
  const [menuOpen, setMenuOpen] = useState(false);
  const entry = ENTRIES.find((one) => one.page === place.page);
  const View = entry?.view;
  useEffect(() => setMenuOpen(false), [place.page, place.item]);
  return (
    <>
      <a class="skip" href="#content">
        Skip to the content
      </a>
      <div class="top">
        <Link page="overview" class="brand">
          <img src="/console/favicon.svg" alt="" width="24" height="24" />
          Understudy
        </Link>
        <button type="button" class="quiet menu" aria-expanded={menuOpen} aria-controls="navigation" onClick={() => setMenuOpen(!menuOpen)}>
          Menu
        </button>
        <nav id="navigation" aria-label="Pages" class={menuOpen ? "open" : ""}>
          <ul>
            {ENTRIES.map((one) => (
              <li key={one.page}>
                <Link page={one.page} aria-current={one.page === place.page ? "page" : undefined}>
                  {one.name}
                </Link>
              </li>
            ))}
          </ul>
          <div class="foot">
            <ThemeButton />
            <CallerButton onOpen={() => setKeyOpen(true)} />
            <a href="/docs">API</a>
          </div>
        </nav>
      </div>
      <main id="content" tabIndex={-1}>
        {session.locked ? (
          <Page title={entry?.name ?? "Understudy"}>
            <Empty>
              <p>{hasKey() ? "The server does not take this key: it is unknown, revoked or has ended." : "This server asks for a key."}</p>
              <p>
                <button type="button" class="button primary" onClick={() => setKeyOpen(true)}>
                  Enter a key
                </button>
              </p>
              <p class="note">
                Whoever runs the server makes one by <code>understudy keys create</code>.
              </p>
            </Empty>
          </Page>
        ) : View ? (
          <View item={place.item} key={place.page} />
        ) : (
          <Page title="No such page">
            <Empty>
              <p>
                The console has no page at this address. Begin at the <Link page="overview">overview</Link>.
              </p>
            </Empty>
          </Page>
        )}
      </main>
      {keyOpen && <KeyDialog onClose={() => setKeyOpen(false)} />}
    </>
  );
}

applyTheme();
const root = document.getElementById("app");
if (root)
  render(
    <SessionProvider>
      <Shell />
    </SessionProvider>,
    root,
  );
