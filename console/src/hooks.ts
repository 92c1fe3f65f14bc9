import { useCallback, useEffect, useRef, useState } from "preact/hooks";

/** What is known of something that is asked for again and again: the last answer stays while the next one is on its way. */
export interface Polled<T> {
  data: T | undefined;
  error: Error | undefined;
  /** When `data` came, in milliseconds. */
  time: number;
  refresh: () => void;
}

/**
 * Asks now, whenever `inputs` change, and every `everyMs` while the page is visible; 0 asks once. Answers of older inputs are dropped.
 */
export function usePolled<T>(load: (signal: AbortSignal) => Promise<T>, everyMs: number, inputs: readonly unknown[]): Polled<T> {
  const [state, setState] = useState<{ data?: T; error?: Error; time: number; of: string }>({ time: 0, of: "" });
  const [round, setRound] = useState(0);
  const latest = useRef(load);
  latest.current = load;
  const id = JSON.stringify(inputs);

  useEffect(() => {
    const abort = new AbortController();
    let timer = 0;
    let running = false;
    const run = async (): Promise<void> => {
      if (running) return;
      running = true;
      try {
        const data = await latest.current(abort.signal);
        if (!abort.signal.aborted) setState({ data, time: Date.now(), of: id });
      } catch (error) {
        if (!abort.signal.aborted) setState((old) => ({ ...old, data: old.of === id ? old.data : undefined, of: id, error: error as Error }));
      }
      running = false;
      if (!abort.signal.aborted && everyMs) timer = window.setTimeout(tick, everyMs);
    };
    const tick = (): void => {
      if (document.visibilityState === "visible") void run();
    };
    const seen = (): void => {
      window.clearTimeout(timer);
      tick();
    };
    void run();
    if (everyMs) document.addEventListener("visibilitychange", seen);
    return () => {
      abort.abort();
      window.clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    };
  }, [id, everyMs, round]);

  const refresh = useCallback(() => setRound((old) => old + 1), []);
  return { data: state.of === id ? state.data : undefined, error: state.of === id ? state.error : undefined, time: state.time, refresh };
}

/** An action that a button starts: whether it runs, and what went wrong. */
export function useAction<A extends unknown[]>(
  act: (...given: A) => Promise<void>,
): { run: (...given: A) => Promise<boolean>; busy: boolean; error: Error | undefined; clear: () => void } {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<Error>();
  const run = async (...given: A): Promise<boolean> => {
    setBusy(true);
    setError(undefined);
    try {
      await act(...given);
      return true;
    } catch (failed) {
      setError(failed as Error);
      return false;
    } finally {
      setBusy(false);
    }
  };
  return { run, busy, error, clear: () => setError(undefined) };
}
