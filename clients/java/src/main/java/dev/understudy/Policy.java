package dev.understudy;

import dev.understudy.v1.InferenceServiceGrpc;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.MethodDescriptor.MethodType;
import java.time.Duration;
import java.util.concurrent.TimeUnit;

/** What goes with every call of a connection: its metadata, and a deadline where the call has none. */
final class Policy implements ClientInterceptor {
  private final Metadata headers;
  private final Duration timeout;

  Policy(Metadata headers, Duration timeout) {
    this.headers = headers;
    this.timeout = timeout;
  }

  @Override
  public <Q, A> ClientCall<Q, A> interceptCall(MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
    // Logs that are followed, and bulk runs, last as long as they last.
    boolean bound = method.getType() == MethodType.UNARY || method.equals(InferenceServiceGrpc.getGenerateMethod());
    if (bound && options.getDeadline() == null) {
      options = options.withDeadlineAfter(timeout.toNanos(), TimeUnit.NANOSECONDS);
    }
    return new SimpleForwardingClientCall<>(next.newCall(method, options)) {
      @Override
      public void start(Listener<A> listener, Metadata sent) {
        sent.merge(headers);
        super.start(listener, sent);
      }
    };
  }
}
