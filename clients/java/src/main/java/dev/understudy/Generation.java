package dev.understudy;

import dev.understudy.v1.GenerateResponse;
import io.grpc.Context;
import io.grpc.StatusRuntimeException;
import java.util.Iterator;

/**
 * An answer that is being written: a loop over its messages, each with what has come since the one before. Closing it, as
 * try-with-resources does, ends the work. It is iterated once.
 */
public final class Generation implements Iterable<GenerateResponse>, AutoCloseable {
  private final Context.CancellableContext context;
  private final Iterator<GenerateResponse> messages;

  Generation(Context.CancellableContext context, Iterator<GenerateResponse> messages) {
    this.context = context;
    this.messages = messages;
  }

  /** The messages; what the server fails with is thrown as UnderstudyException. */
  @Override
  public Iterator<GenerateResponse> iterator() {
    return new Iterator<>() {
      @Override
      public boolean hasNext() {
        try {
          boolean more = messages.hasNext();
          if (!more) {
            close();
          }
          return more;
        } catch (StatusRuntimeException thrown) {
          throw UnderstudyException.of(thrown);
        }
      }

      @Override
      public GenerateResponse next() {
        try {
          return messages.next();
        } catch (StatusRuntimeException thrown) {
          throw UnderstudyException.of(thrown);
        }
      }
    };
  }

  @Override
  public void close() {
    context.cancel(null);
  }
}
