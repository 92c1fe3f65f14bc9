import { createContext, type ComponentChildren } from "preact";
import { useContext, useMemo } from "preact/hooks";
import { ApiError, ask } from "./api";
import { usePolled } from "./hooks";
import type { Caller, Role } from "./types";

const ORDER: readonly Role[] = ["ROLE_UNSPECIFIED", "ROLE_VIEWER", "ROLE_USER", "ROLE_OPERATOR", "ROLE_ADMIN"];

/** Who asks, and what they may do. */
export interface Session {
  caller: Caller | undefined;
  error: Error | undefined;
  /** True where the server wants a key, and has got none or a wrong one. */
  locked: boolean;
  refresh: () => void;
  /** Why the caller may not do what takes this role; empty where it may. */
  refusal: (role: Role) => string;
}

const Context = createContext<Session>({ caller: undefined, error: undefined, locked: false, refresh: () => undefined, refusal: () => "" });

export const useSession = (): Session => useContext(Context);

export const roleWord = (role: Role | undefined): string => (role ?? "").replace("ROLE_", "").toLowerCase();

export function SessionProvider({ children }: { children: ComponentChildren }) {
  const { data, error, refresh } = usePolled((signal) => ask<Caller>("/v1/caller", { signal }), 60_000, []);
  const session = useMemo<Session>(() => {
    // A server that does not know the question asks for no keys either: it decides when it is asked.
    const role = data?.role;
    return {
      caller: data,
      error,
      locked: error instanceof ApiError && error.http === 401,
      refresh,
      refusal: (needed) =>
        role === undefined || ORDER.indexOf(role) >= ORDER.indexOf(needed)
          ? ""
          : `This takes the role ${roleWord(needed)}; your key has the role ${roleWord(role)}.`,
    };
  }, [data, error, refresh]);
  return <Context.Provider value={session}>{children}</Context.Provider>;
}
