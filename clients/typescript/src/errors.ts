/** What a call can throw: the gRPC code, the server's own reason, and what it says of when to try again. */

import { type Message } from "@bufbuild/protobuf";
import { anyUnpack } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";

import { ErrorInfoSchema, RequestInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import type { ErrorInfo, RequestInfo, RetryInfo } from "./gen/google/rpc/error_details_pb.js";
import type { Status } from "./gen/google/rpc/status_pb.js";

/** gRPC's codes by their canonical names, at their numbers. */
const CODES = [
  "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
  "UNAUTHENTICATED",
] as const;

export type CodeName = (typeof CODES)[number];

export interface ErrorFields {
  code: CodeName;
  message: string;
  reason?: string;
  metadata?: Readonly<Record<string, string>>;
  requestId?: string;
  retryAfterMs?: number | undefined;
  cause?: unknown;
}

export class UnderstudyError extends Error {
  override readonly name = "UnderstudyError";
  /** gRPC's code, for example "NOT_FOUND". */
  readonly code: CodeName;
  /** The server's own, finer one, for example "MODEL_NOT_FOUND": the values of ErrorReason. Empty where the server did not answer. */
  readonly reason: string;
  /** What varies in the message, for example { model: "x" }. Of a deadline `stage` says where; "client" where no answer came in time. */
  readonly metadata: Readonly<Record<string, string>>;
  /** For the operator of the server. */
  readonly requestId: string;
  /** The wait that the server asks for. */
  readonly retryAfterMs: number | undefined;

  constructor(fields: ErrorFields) {
    super(fields.message, fields.cause === undefined ? undefined : { cause: fields.cause });
    this.code = fields.code;
    const late = fields.code === "DEADLINE_EXCEEDED" && !fields.reason;
    const left = fields.code === "CANCELLED" && !fields.reason;
    this.reason = late ? "DEADLINE_EXCEEDED" : left ? "CANCELLED" : (fields.reason ?? "");
    this.metadata = late ? { stage: "client" } : (fields.metadata ?? {});
    this.requestId = fields.requestId ?? "";
    this.retryAfterMs = fields.retryAfterMs;
  }

  /** The part of the request that is to blame, or "". */
  get field(): string {
    return this.metadata["field"] ?? "";
  }

  /**
   * Whether sending the same again is safe and may help: the server says when, so it has not begun. What providers failed at may have been
   * paid.
   */
  get retryable(): boolean {
    const refused = this.code === "UNAVAILABLE" || this.code === "RESOURCE_EXHAUSTED";
    return refused && this.retryAfterMs !== undefined && this.reason !== "PROVIDER_UNAVAILABLE";
  }
}

interface Details {
  info: ErrorInfo | undefined;
  retry: RetryInfo | undefined;
  request: RequestInfo | undefined;
}

function describe(found: Details): Pick<ErrorFields, "reason" | "metadata" | "requestId" | "retryAfterMs"> {
  const delay = found.retry?.retryDelay;
  return {
    reason: found.info?.reason ?? "",
    metadata: found.info?.metadata ?? {},
    requestId: found.request?.requestId ?? "",
    retryAfterMs: delay === undefined ? undefined : Number(delay.seconds) * 1000 + delay.nanos / 1e6,
  };
}

/** The error that a google.rpc.Status describes: of one item of a batch, its `error`. */
export function fromStatus(status: Status): UnderstudyError {
  const unpacked = (schema: Parameters<typeof anyUnpack>[1]): Message | undefined =>
    status.details.map((one) => anyUnpack(one, schema)).find((one) => one !== undefined);
  const found: Details = {
    info: unpacked(ErrorInfoSchema) as ErrorInfo | undefined,
    retry: unpacked(RetryInfoSchema) as RetryInfo | undefined,
    request: unpacked(RequestInfoSchema) as RequestInfo | undefined,
  };
  return new UnderstudyError({ code: CODES[status.code] ?? "UNKNOWN", message: status.message, ...describe(found) });
}

/** Any thrown value as an UnderstudyError. */
export function fromThrown(thrown: unknown): UnderstudyError {
  if (thrown instanceof UnderstudyError) {
    return thrown;
  }
  const error = ConnectError.from(thrown);
  const found: Details = {
    info: error.findDetails(ErrorInfoSchema)[0],
    retry: error.findDetails(RetryInfoSchema)[0],
    request: error.findDetails(RequestInfoSchema)[0],
  };
  const described = describe(found);
  const requestId = described.requestId || (error.metadata.get("x-request-id") ?? "");
  const code = unreachable(error) ? "UNAVAILABLE" : (CODES[error.code] ?? "UNKNOWN");
  return new UnderstudyError({ code, message: error.rawMessage, ...described, requestId, cause: thrown });
}

/** Whether Node could not connect, for example because of the certificate: Connect calls some of that INTERNAL, which is the server's word. */
function unreachable(error: ConnectError): boolean {
  return error.code === Code.Internal && error.cause instanceof Error && "code" in error.cause && error.details.length === 0;
}

/** A code by its name; UNKNOWN for a name that gRPC does not have. */
export function codeNamed(name: string): CodeName {
  return CODES.find((one) => one === name) ?? "UNKNOWN";
}
