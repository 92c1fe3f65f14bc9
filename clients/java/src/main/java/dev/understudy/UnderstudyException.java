package dev.understudy;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RequestInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.Map;
import java.util.Optional;

/** What a call, or an item of a batch, failed with. */
public final class UnderstudyException extends RuntimeException {
  private static final long serialVersionUID = 1L;
  private static final Metadata.Key<String> REQUEST_ID =
      Metadata.Key.of("x-request-id", Metadata.ASCII_STRING_MARSHALLER);

  private final Status.Code code;
  private final String reason;
  private final transient Map<String, String> metadata;
  private final String requestId;
  private final Duration retryAfter;

  private UnderstudyException(
      com.google.rpc.Status status, String requestId, Throwable cause) {
    super(status.getMessage(), cause);
    String foundReason = "";
    Map<String, String> foundMetadata = Map.of();
    Duration foundDelay = null;
    for (Any detail : status.getDetailsList()) {
      try {
        if (detail.is(ErrorInfo.class)) {
          ErrorInfo info = detail.unpack(ErrorInfo.class);
          foundReason = info.getReason();
          foundMetadata = Map.copyOf(info.getMetadataMap());
        } else if (detail.is(RetryInfo.class)) {
          var delay = detail.unpack(RetryInfo.class).getRetryDelay();
          foundDelay = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
        } else if (detail.is(RequestInfo.class)) {
          requestId = detail.unpack(RequestInfo.class).getRequestId();
        }
      } catch (InvalidProtocolBufferException broken) {
        addSuppressed(broken); // a proxy's detail, not the server's; the code still holds
      }
    }
    this.code = Status.fromCodeValue(status.getCode()).getCode();
    if (foundReason.isEmpty() && code == Status.Code.DEADLINE_EXCEEDED) {
      foundReason = "DEADLINE_EXCEEDED";
      foundMetadata = Map.of("stage", "client");
    } else if (foundReason.isEmpty() && code == Status.Code.CANCELLED) {
      foundReason = "CANCELLED";
    }
    this.reason = foundReason;
    this.metadata = foundMetadata;
    this.requestId = requestId;
    this.retryAfter = foundDelay;
  }

  /** The error of an item of a batch: its field {@code error}. */
  public static UnderstudyException of(com.google.rpc.Status status) {
    return new UnderstudyException(status, "", null);
  }

  /** What gRPC threw, with the server's details where it sent some. */
  public static UnderstudyException of(StatusRuntimeException thrown) {
    Metadata trailers = thrown.getTrailers();
    String requestId = trailers == null ? null : trailers.get(REQUEST_ID);
    com.google.rpc.Status status = StatusProto.fromThrowable(thrown);
    return new UnderstudyException(status, requestId == null ? "" : requestId, thrown);
  }

  /** gRPC's code. */
  public Status.Code code() {
    return code;
  }

  /**
   * The server's own, finer code, for example "MODEL_NOT_FOUND": the values of ErrorReason without their prefix. Empty
   * where the server did not answer.
   */
  public String reason() {
    return reason;
  }

  /**
   * What varies in the message. Of a deadline "stage" says where it passed; "client" where no answer came in time.
   */
  public Map<String, String> metadata() {
    return metadata;
  }

  /** The part of the request that is to blame, or "". */
  public String field() {
    return metadata.getOrDefault("field", "");
  }

  /** For the operator of the server. */
  public String requestId() {
    return requestId;
  }

  /** The wait that the server asks for. */
  public Optional<Duration> retryAfter() {
    return Optional.ofNullable(retryAfter);
  }

  /**
   * Whether sending the same again is safe and may help: the server says when, so it has not begun. What providers failed
   * at may have been paid.
   */
  public boolean retryable() {
    boolean refused = code == Status.Code.UNAVAILABLE || code == Status.Code.RESOURCE_EXHAUSTED;
    return refused && retryAfter != null && !reason.equals("PROVIDER_UNAVAILABLE");
  }

  @Override
  public String toString() {
    String shown = reason.isEmpty() ? "" : " (" + reason + ")";
    return getClass().getName() + ": " + code + shown + ": " + getMessage();
  }
}
