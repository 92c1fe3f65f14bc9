import type { ComponentChildren } from "preact";

export interface Column<T> {
  name: string;
  cell: (row: T) => ComponentChildren;
  /** Figures are set flush right. */
  figure?: boolean;
  /** The cell that names the row. */
  head?: boolean;
}

interface TableProps<T> {
  caption: string;
  columns: readonly Column<T>[];
  rows: readonly T[];
  id: (row: T) => string;
  current?: string;
}

/** A table; on a narrow screen each row becomes a block, with the columns' names before the values. */
export function Table<T>({ caption, columns, rows, id, current }: TableProps<T>) {
  return (
    <table class="rows">
      <caption class="sr">{caption}</caption>
      <thead>
        <tr>
          {columns.map((column) => (
            <th key={column.name} scope="col" class={column.figure ? "figure" : ""}>
              {column.name}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {rows.map((row) => (
          <tr key={id(row)} class={id(row) === current ? "current" : ""}>
            {columns.map((column) =>
              column.head ? (
                <th key={column.name} scope="row">
                  {column.cell(row)}
                </th>
              ) : (
                <td key={column.name} class={column.figure ? "figure" : ""} data-name={column.name}>
                  {column.cell(row)}
                </td>
              ),
            )}
          </tr>
        ))}
      </tbody>
    </table>
  );
}
