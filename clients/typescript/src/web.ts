/** The client for browsers, over the gateway's REST paths; it works wherever there is fetch. */

import { UnderstudyClient } from "./client.js";
import type { Policy } from "./policy.js";
import { createRestTransport, type RestOptions } from "./rest.js";

/** A client of a gateway, for example `connect({ baseUrl: "https://understudy.example.com" })`. */
export function connect(options: RestOptions & Policy): UnderstudyClient {
  return new UnderstudyClient(createRestTransport(options), options);
}

export * from "./client.js";
export { UnderstudyError, fromStatus, type CodeName } from "./errors.js";
export type { Policy } from "./policy.js";
export type { RestOptions } from "./rest.js";
