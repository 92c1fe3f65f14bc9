/** The client for Node.js, over gRPC. */

import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";

import { UnderstudyClient } from "./client.js";
import type { Policy } from "./policy.js";

/** Encryption, in PEM. Without `ca` the authorities that Node knows; with `cert` and `key` the client shows who it is. */
export interface Tls {
  ca?: string | Buffer;
  cert?: string | Buffer;
  key?: string | Buffer;
  /** The name that the server's certificate must have, where it is not the address's. */
  serverName?: string;
}

export interface ConnectOptions extends Policy {
  /** Encrypts; `true`: with the authorities that Node knows. */
  tls?: Tls | boolean;
}

/** A connection to a server, for example `connect("127.0.0.1:50051")`. Nothing is sent before the first call. */
export function connect(address: string, options: ConnectOptions = {}): UnderstudyClient {
  const { tls, ...policy } = options;
  const baseUrl = `${tls ? "https" : "http"}://${address}`;
  const { serverName, ...pem } = typeof tls === "object" ? tls : {};
  const nodeOptions = { ...pem, ...(serverName === undefined ? {} : { servername: serverName }) };
  const sessionManager = new Http2SessionManager(baseUrl, undefined, nodeOptions);
  const transport = createGrpcTransport({ baseUrl, sessionManager });
  return new UnderstudyClient(transport, policy, () => sessionManager.abort());
}

export * from "./client.js";
export { UnderstudyError, fromStatus, type CodeName } from "./errors.js";
export type { Policy } from "./policy.js";
