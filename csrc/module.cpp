// The Python module `heatsink._C`. Importing it runs the static initialisers of the other files,
// which give the ops declared in Python their CPU implementation.

#include <Python.h>

#include "interface.h"

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                          "_C",
                                          "C++ implementations of heatsink's ops.",
                                          -1,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "INTERFACE", HEATSINK_INTERFACE) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
