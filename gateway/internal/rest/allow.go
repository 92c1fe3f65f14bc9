package rest

import (
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	gen "understudy.dev/gen/understudy/v1"
)

// binding is a path's pattern and a method that it is served with.
type binding struct {
	path   *regexp.Regexp
	method string
}

var (
	fieldOf  = regexp.MustCompile(`\\\{[^}=]*=([^}]*)\\\}`) // of a quoted template
	bindings = sync.OnceValue(readBindings)
)

// allowed are the methods that a path is served with, for the header allow, which an answer 405 has to have.
func allowed(path string) []string {
	var methods []string
	for _, one := range bindings() {
		if one.path.MatchString(path) && !slices.Contains(methods, one.method) {
			methods = append(methods, one.method)
		}
	}
	slices.Sort(methods)
	return methods
}

// readBindings reads the HTTP rules of all services.
func readBindings() []binding {
	var found []binding
	add := func(rule *annotations.HttpRule) {
		for method, template := range map[string]string{
			http.MethodGet: rule.GetGet(), http.MethodPost: rule.GetPost(), http.MethodPut: rule.GetPut(),
			http.MethodDelete: rule.GetDelete(), http.MethodPatch: rule.GetPatch(),
		} {
			if template != "" {
				found = append(found, binding{patternOf(template), method})
			}
		}
	}
	protoregistry.GlobalFiles.RangeFilesByPackage(gen.File_understudy_v1_inference_service_proto.Package(), func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				if rule, ok := proto.GetExtension(methods.Get(j).Options(), annotations.E_Http).(*annotations.HttpRule); ok && rule != nil {
					add(rule)
					for _, more := range rule.GetAdditionalBindings() {
						add(more)
					}
				}
			}
		}
		return true
	})
	return found
}

// patternOf turns "/v1/{name=models/*}:load" into an expression; a star is one segment, and a colon begins a verb.
func patternOf(template string) *regexp.Regexp {
	quoted := fieldOf.ReplaceAllString(regexp.QuoteMeta(template), "$1")
	return regexp.MustCompile("^" + strings.ReplaceAll(quoted, `\*`, "[^/:]+") + "$")
}
