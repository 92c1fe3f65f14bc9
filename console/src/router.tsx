import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";

/** Where the reader is: a page, and what of it. "/" is the overview; "/console/skills/support-intent" is a skill. */
export interface Place {
  page: string;
  item: string;
}

export function placeOf(path: string): Place {
  const [page = "", ...rest] = path.replace(/^\/console\/?/, "").replace(/^\/|\/$/g, "").split("/");
  return { page: page || "overview", item: rest.map(decodeURIComponent).join("/") };
}

export function pathOf(page: string, item = ""): string {
  if (page === "overview") return "/";
  return `/console/${page}${item ? `/${item.split("/").map(encodeURIComponent).join("/")}` : ""}`;
}

export function go(page: string, item = ""): void {
  history.pushState(null, "", pathOf(page, item));
  dispatchEvent(new PopStateEvent("popstate"));
}

export function usePlace(): Place {
  const [place, setPlace] = useState(() => placeOf(location.pathname));
  useEffect(() => {
    const moved = (): void => setPlace(placeOf(location.pathname));
    addEventListener("popstate", moved);
    return () => removeEventListener("popstate", moved);
  }, []);
  return place;
}

interface LinkProps {
  class?: string;
  "aria-current"?: "page" | undefined;
  page: string;
  item?: string;
  children: ComponentChildren;
}

/** A link within the console; modifier keys and the middle button do what they do everywhere. */
export function Link({ page, item, children, ...rest }: LinkProps) {
  const clicked = (event: MouseEvent): void => {
    if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey || event.button !== 0) return;
    event.preventDefault();
    go(page, item);
  };
  return (
    <a {...rest} href={pathOf(page, item)} onClick={clicked}>
      {children}
    </a>
  );
}
